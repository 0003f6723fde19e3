"""Makes a Hugging Face folder of a GGUF file, for those who have a model in that form only.

    pip install gguf torch
    python tools/from_gguf.py MODEL.gguf DIRECTORY

`transformers` reads the file: weights come out of their few bits as float32 (or --dtype), config,
tokenizer and chat template out of the header. What the quantization lost stays lost, and headers do
not say everything (how numbers are cut before merging, say), so where the publisher's own folder can
be had, take that.
"""

import argparse
import pathlib

import torch
import transformers


def convert(source: pathlib.Path, directory: pathlib.Path, dtype: str) -> None:
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    words = transformers.AutoTokenizer.from_pretrained(**where)
    if not words.chat_template:
        raise SystemExit(f"{source}: no chat template in its header; a run needs one.")
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    # A model of its own: the one that was read counts as quantized and refuses to be written.
    config = read.config
    del config.quantization_config
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    made.load_state_dict(read.state_dict())
    made.generation_config = transformers.GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    made.save_pretrained(directory)
    words.save_pretrained(directory)
    print(f"{directory}: {made.num_parameters():,} parameters, {dtype}, {len(words):,} ids")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path, metavar="MODEL.gguf")
    parser.add_argument("directory", type=pathlib.Path, metavar="DIRECTORY")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args(arguments)
    if not options.source.is_file():
        found = "is a folder" if options.source.is_dir() else "does not exist"
        raise SystemExit(f"{options.source} {found}; expected a GGUF file.")
    with options.source.open("rb") as file:
        if (begins := file.read(4)) != b"GGUF":
            raise SystemExit(f"{options.source} begins with {begins!r}; expected a GGUF file, which begins with b'GGUF'.")
    if options.directory.exists() and any(options.directory.iterdir()):
        raise SystemExit(f"{options.directory} is not empty; give a new directory.")
    convert(options.source, options.directory, options.dtype)


if __name__ == "__main__":
    main()
