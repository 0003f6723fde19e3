"""Certifies a model folder for training: tokens in are tokens out, and one model says both.

    python tools/check_tokens.py MODEL_DIR [--dtype bfloat16] [--system "Play well."]
        [--template_options '{"enable_thinking": false}'] [--data 1 --fsdp 4 --tensor 2]

The model talks to itself through the sampler, as in a rollout (slots, a cache, turns of several
lengths), and the same programs as in training score what it said. As in a run the weights are float32,
and both compute in --dtype (learner.compute_dtype) from copies of their own. Checked are

vocabulary    the model has an embedding for every id that a text may come to
first prompt  is, id for id, that of the tokenizer's own chat template
template      a conversation of plain answers is, too, in every turn; where the template renders even
              those otherwise later on, a note says so and this is left out
append-only   a later prompt only appends to what was consumed and sampled: the text of a whole
              conversation, decoded at once, is what was told and said in their order, each once, and
              the template's glue between them
masks         the tokens that training would weigh are exactly those that were sampled, with the end
              of turn where one was sampled
log-probs     of every sampled token as the sampler reported it and as the scoring pass has it, each
              conversation in a row of its own and several packed in one (learner.packing): the
              largest gap with the token where it is, and the mean gap. In float32 the largest is
              held to a limit; where the computation or the cache is coarser, the mean

It prints one line for each and leaves with status 1 if any fails. A check that fails means that the
model would be trained on something else than it did: do not train it.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from envs_host.types import StopReason, Task
from jaxagentrl import batching, chat, engine, learner, packing, precision, tokenizer
from jaxagentrl.models import decoder, decoding_layout, kv_cache, pretrained, sharding
from jaxagentrl.trajectory import Trajectory, Turn

# Most that the two passes may differ, in nats. In float32 they differ by rounding, and the largest gap is
# judged. In bfloat16 the largest of some hundred is a matter of luck: SmolLM2-135M, which trains well in it,
# came to 0.24 to 0.46, but on average to 0.033 to 0.039 on every machine, and four layers of a 0.5B with
# random weights to 0.0025 (docs/performance.md, "The gap between sampler and learner"). So the mean is judged,
# with room for deeper models.
# So it is with float32 and a cache in bfloat16 or int8.
LIMITS = {"largest": 1e-4, "mean": 0.1}

# Lengths of caches and rows are multiples of this: kernels want it of a run's lengths too.
LENGTH_MULTIPLE = 128

# Texts that environments say and that tokenizers stumble over.
TEXTS = (
    "You are in the kitchen.\nThere is a closed box44 here.\n\nWhat do you do?",
    "You take the Z-key.   It is  heavy.",
    "$ ls -la\ntotal 8\n\tdrwxr-xr-x 2 root root 4096 .\n",
    "Ünïcödé: 你好 ☃ 🙂",
    "",
    " a text with spaces around it ",
)

# What a trained agent would answer: canonical encodings, without thoughts.
PLAIN_ANSWERS = ("open box", "take Z-key from box44", "go north", "look")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check: whether it passed and what to print."""

    name: str
    passed: bool
    text: str


def check_first_prompts(made: chat.ChatFormat, system: str | None) -> Finding:
    """Against the template's own ids."""
    wrong = [
        text for text in TEXTS
        if made.first_prompt(text).tolist() != _template_ids(made, system, [text])
    ]
    said = f"{len(TEXTS) - len(wrong)} of {len(TEXTS)} first prompts equal the template's"
    return Finding("first prompt", not wrong, said + (f"; not {wrong[0]!r}" if wrong else ""))


def check_template(made: chat.ChatFormat, system: str | None) -> Finding | None:
    """A conversation of plain answers against the template's own ids, turn by turn; None where the
    template renders its history otherwise (`ChatFormat.differences`)."""
    if not made.keeps_plain_history:
        return None
    texts = [TEXTS[0]]
    ids = made.first_prompt(TEXTS[0])
    wrong = []
    for number, (answer, told) in enumerate(zip(PLAIN_ANSWERS, TEXTS[1:], strict=False), 2):
        following = made.next_prompt(told, ended=True)
        ids = np.concatenate([ids, made.encode_action(answer), following])
        texts += [answer, told]
        if ids.tolist() != _template_ids(made, system, texts):
            wrong.append(number)
    said = f"{len(PLAIN_ANSWERS) - len(wrong)} of {len(PLAIN_ANSWERS)} later prompts equal the template's"
    return Finding("template", not wrong, said + (f"; not that of turn {wrong[0]}" if wrong else ""))


def _template_ids(made: chat.ChatFormat, system: str | None, texts: Sequence[str]) -> list[int]:
    """The template's own ids of a conversation that alternates user and assistant."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for index, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[index % 2], "content": text})
    return list(made.tokenizer.apply_chat_template(
        messages, chat_template=made.chat_template, tokenize=True, add_generation_prompt=True,
        return_dict=True, **made.template_options,
    )["input_ids"])


def texts_told(conversation: int, turns: int) -> list[str]:
    """What the user says in the turns of a conversation."""
    return [TEXTS[(conversation + number) % len(TEXTS)] for number in range(turns)]


def converse(
    config: decoder.DecoderConfig,
    params: decoder.Params,
    made: chat.ChatFormat,
    *,
    conversations: int,
    turns: int,
    turn_tokens: int,
    cache_dtype: str,
    seed: int,
    stop_ids: Sequence[int] = (),
) -> list[Trajectory]:
    """Conversations sampled at temperature 1, as the rollout's records. Budgets differ, so that some
    turns are cut. `stop_ids` end a turn as the end of turn does."""
    prompts = [made.first_prompt(text) for text in TEXTS]
    longest = max(len(ids) for ids in prompts) + 64
    length = _rounded(turns * (longest + turn_tokens))
    sampler = engine.Engine(
        config,
        num_slots=conversations,
        num_waves=1,
        max_length=length,
        max_turn_tokens=turn_tokens,
        stop_ids=list(dict.fromkeys([made.end_of_turn_id, *stop_ids])),
        filled_buckets=(length // 2, length),
        width_buckets=(16, 64),
        cache_dtype=cache_dtype,
    )
    records: list[list[Turn]] = [[] for _ in range(conversations)]
    for number in range(turns):
        new = {}
        for slot, record in enumerate(records):
            text = texts_told(slot, turns)[number]
            if number == 0:
                new[slot] = made.first_prompt(text)
            else:
                ended = record[-1].action_ids[-1] == made.end_of_turn_id
                new[slot] = made.next_prompt(text, ended=bool(ended))
            sampler.submit(0, engine.TurnRequest(
                slot=slot, new_ids=new[slot], budget=max(1, turn_tokens - 3 * slot),
                stream=(seed, slot, number),
            ))
        samples = {}
        while sampler.is_busy(0):
            sampler.launch(params, 0)
            samples |= sampler.receive(0)
        for slot, record in enumerate(records):
            record.append(_turn(made, new[slot], samples[slot]))
            consumed = sum(turn.num_tokens for turn in record)
            if sampler.length(0, slot) != consumed:
                raise RuntimeError(
                    f"the sampler holds {sampler.length(0, slot)} tokens, the record {consumed}"
                )
    task = Task("check_tokens", "self-talk", {}, seed, "", "self-talk", "", 1.0, ())
    return [
        Trajectory(task=task, group=slot, member=0, turns=record, won=False, score=0.0,
                   stop_reason=StopReason.TURN_LIMIT, max_score=1.0)
        for slot, record in enumerate(records)
    ]


def _rounded(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def _turn(made: chat.ChatFormat, prompt_ids: np.ndarray, sample: engine.TurnSample) -> Turn:
    text = made.decode_action(sample.ids)
    return Turn(
        prompt_ids=prompt_ids, action_ids=sample.ids, logprobs=sample.logprobs,
        entropies=sample.entropies, observation="", action=text, command=text, reward=0.0,
        intermediate_reward=0.0, valid_command=True, score=0.0,
    )


def check_append_only(
    made: chat.ChatFormat, talks: Sequence[Trajectory], told: Sequence[Sequence[str]]
) -> Finding:
    """The text of each conversation, decoded at once, against what was told and said in it.

    Args:
        told: what the user said in the turns of each conversation.
    """
    problems = []
    retokenized = actions = 0
    for number, (talk, texts) in enumerate(zip(talks, told, strict=True)):
        problems += [f"conversation {number}: {problem}" for problem in _misread(made, talk, texts)]
        for turn in talk.turns:
            canonical = made.encode_action(turn.action)
            sampled = turn.action_ids
            if sampled[-1] != made.end_of_turn_id:
                canonical = canonical[:-1]
            actions += 1
            retokenized += not np.array_equal(canonical, sampled)
    said = f"{actions} turns appended; "
    said += f"{retokenized} of them would come back as other ids from their text"
    return Finding("append-only", not problems, "; ".join([said, *problems[:3]]))


def _misread(made: chat.ChatFormat, talk: Trajectory, texts: Sequence[str]) -> list[str]:
    """Where a conversation's text is not its opening, then user, header, answer, end, glue, user, …"""
    if len(talk.turns) != len(texts):
        return [f"{len(talk.turns)} turns for {len(texts)} texts of the user"]
    ids = [piece for turn in talk.turns for piece in (turn.prompt_ids, turn.action_ids)]
    rest = _plain(made.decode(np.concatenate(ids)))
    for number, (turn, text) in enumerate(zip(talk.turns, texts, strict=True), 1):
        before = made.before_first if number == 1 else made.end_of_turn + made.between
        for name, piece in (
            ("opening" if number == 1 else "glue", before),
            ("user text", text.strip() if made.strips_user_text else text),
            ("header", made.header),
            ("answer", made.decode([id for id in turn.action_ids if id != made.end_of_turn_id])),
        ):
            piece = _plain(piece)
            if not rest.startswith(piece):
                return [f"turn {number}: the {name} {piece[:40]!r} is expected at {rest[:40]!r}"]
            rest = rest.removeprefix(piece)
    if rest not in ("", made.end_of_turn):
        return [f"{rest[:40]!r} is left after the last answer"]
    return []


def _plain(text: str) -> str:
    # Spaces at the beginning of a text and behind special tokens are shown by some SentencePiece models and
    # left out by others, and bytes that are no character by as many signs as there are in their neighbourhood.
    # The spaces of prompts are compared as ids, by the checks before.
    return re.sub("[\ufffd\\s]+", "", text)


def check_masks(made: chat.ChatFormat, talks: Sequence[Trajectory], batch) -> Finding:
    """What training weighs, read back from the batch."""
    problems = []
    for row, talk in enumerate(talks):
        sampled = np.concatenate([turn.action_ids for turn in talk.turns])
        mask = batch.action_mask[row]
        if not np.array_equal(batch.tokens[row][mask], sampled):
            problems.append(f"row {row}: the mask marks other tokens than were sampled")
        given = batch.tokens[row][batch.valid_mask[row] & ~mask]
        prompts = np.concatenate([turn.prompt_ids for turn in talk.turns])
        if not np.array_equal(given, prompts):
            problems.append(f"row {row}: prompts are not what the mask leaves out")
        ends = batch.tokens[row][batch.turn_ends[row]]
        expected = [turn.action_ids[-1] for turn in talk.turns]
        if ends.tolist() != expected:
            problems.append(f"row {row}: turns do not end where they did")
    marked, ended = int(batch.action_mask.sum()), sum(
        int(turn.action_ids[-1] == made.end_of_turn_id) for talk in talks for turn in talk.turns
    )
    said = f"{marked} sampled tokens marked, {ended} ends of turn among them"
    return Finding("masks", not problems, "; ".join([said, *problems[:3]]))


def check_logprobs(
    made: chat.ChatFormat,
    config: decoder.DecoderConfig,
    params: decoder.Params,
    batch,
    *,
    compute_dtype: str,
    cache_dtype: str,
    tolerance: float | None,
    is_packed: bool,
    mesh: jax.sharding.Mesh | None = None,
) -> Finding:
    """Sampler against scoring pass, token by token."""
    name = "log-probs, packed" if is_packed else "log-probs, in rows"
    score = learner.make_score(config, temperature=1.0, compute_dtype=compute_dtype)
    rows = np.arange(len(batch.tokens), dtype=np.int32)
    work = packing.Rows(rows[None], np.int32(1), batch.tokens.shape[1])
    if is_packed:
        lengths = batch.valid_mask.sum(axis=1)
        work = packing.pack(
            rows, lengths, shape=batch.tokens.shape, length=_rounded(int(lengths.sum())),
            tokens_per_part=1, row_multiple=1,
        )
    with sharding.use(mesh):
        scored = np.asarray(
            score({"policy": params}, batch.tokens, batch.action_mask, (work,)).logprobs
        )
    gaps = np.where(batch.action_mask, np.abs(scored - batch.sampler_logprobs), 0.0)
    if not np.all(np.isfinite(scored[batch.action_mask])):
        return Finding(name, False, "the scoring pass gives non-finite log-probs")
    row, place = np.unravel_index(np.argmax(gaps), gaps.shape)
    token = int(batch.tokens[row, place])
    mean = float(gaps.sum() / batch.action_mask.sum())
    text = made.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    judged = "largest" if compute_dtype == cache_dtype == "float32" else "mean"
    limit = LIMITS[judged] if tolerance is None else tolerance
    said = (
        f"largest gap {gaps[row, place]:.2e}, mean {mean:.2e} (limit of the {judged} {limit:g}); worst "
        f"token {token} {text!r} in conversation {row}, turn {batch.turn_ids[row, place] + 1}, position "
        f"{place}: sampler {batch.sampler_logprobs[row, place]:.6f}, scoring {scored[row, place]:.6f}"
    )
    passed = bool({"largest": gaps.max(), "mean": mean}[judged] <= limit)
    if not passed and judged == "mean":
        coarse = compute_dtype if compute_dtype != "float32" else f"a cache in {cache_dtype}"
        said += (
            f". Rounding or a mistake? If --dtype and --cache_dtype float32 pass, it is the rounding of {coarse} "
            "on these weights; rl.loss.importance_cap corrects for it"
        )
    return Finding(name, passed, said)


def check(
    directory: str, made: chat.ChatFormat, options: argparse.Namespace
) -> list[Finding]:
    """All findings for a model folder, with the chat format of its tokenizer."""
    cache_dtype = options.cache_dtype or options.dtype
    mesh = sharding.make_mesh(data=options.data, fsdp=options.fsdp, tensor=options.tensor)
    config, params = pretrained.load(directory, mesh=mesh)
    try:
        chat.check_vocabulary(made, config.vocab_size)
    except ValueError as error:
        return [Finding("vocabulary", False, str(error))]
    vocabulary = f"{config.vocab_size} embeddings for {len(made.tokenizer)} ids"
    with sharding.use(mesh):
        decoding = decoding_layout.for_decoding(params, options.dtype)
    decoding = sharding.for_decoding(decoding, mesh)
    with sharding.use(None if mesh is None else sharding.decoding_mesh(mesh)):
        talks = converse(
            config, decoding, made,
            conversations=options.conversations, turns=options.turns, turn_tokens=options.turn_tokens,
            cache_dtype=cache_dtype, seed=options.seed,
            stop_ids=pretrained.stop_ids(directory),
        )
    told = [texts_told(number, options.turns) for number in range(options.conversations)]
    length = _rounded(max(talk.num_tokens for talk in talks))
    batch = batching.to_batch(talks, None, discount=1.0, length_buckets=[length], row_multiple=1)
    history = check_template(made, options.system)
    return [
        Finding("vocabulary", True, vocabulary),
        check_first_prompts(made, options.system),
        *([] if history is None else [history]),
        check_append_only(made, talks, told),
        check_masks(made, talks, batch),
        *(
            check_logprobs(
                made, config, params, batch,
                compute_dtype=options.dtype, cache_dtype=cache_dtype, tolerance=options.tolerance,
                is_packed=is_packed, mesh=mesh,
            )
            for is_packed in (False, True)
        ),
    ]


def _json_object(text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error
    if not isinstance(read, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as {{\"enable_thinking\": false}}")
    return read


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
        return int(text)

    return read


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a Hugging Face model folder with its tokenizer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32",
                        help="that the run computes in, learner.compute_dtype")
    parser.add_argument("--cache_dtype", choices=kv_cache.DTYPES,
                        help="of keys and values, sampling.cache_dtype; default --dtype")
    parser.add_argument("--system", help="a system message, the run's prompt.system")
    parser.add_argument("--template_options", type=_json_object, default={}, metavar="JSON",
                        help="variables of the chat template, the run's prompt.template_options")
    for axis in sharding.AXES:
        parser.add_argument(f"--{axis}", type=int, default=1,
                            help=f"devices along an axis of the mesh, the run's mesh.{axis}")
    parser.add_argument("--conversations", type=_at_least(1), default=4)
    parser.add_argument("--turns", type=_at_least(1), default=4)
    parser.add_argument("--turn_tokens", type=_at_least(1), default=32, help="most tokens of a turn")
    parser.add_argument("--tolerance", type=float, help="most that is allowed, in nats, of the gap that "
                        "is judged")
    parser.add_argument("--seed", type=_at_least(0), default=0)
    options = parser.parse_args(arguments)
    try:
        return certify(options)
    except ValueError as error:  # a folder that is no model's, a template that cannot be used
        print(f"error: {error}", file=sys.stderr)
        return 2


def certify(options: argparse.Namespace) -> int:
    """Prints a line for each finding; 0 if all pass."""
    made = chat.make(
        tokenizer.load(options.directory),
        system=options.system,
        template_options=options.template_options,
    )
    print(f"chat family {made.family}, end of turn {made.end_of_turn!r} ({made.end_of_turn_id})")
    for difference in made.differences:
        print(f"note: {difference}")
    precision.keep_float32(options.dtype)  # as runs do
    findings = check(options.directory, made, options)
    for finding in findings:
        print(f"{'ok  ' if finding.passed else 'FAIL'} {finding.name}: {finding.text}")
    return 0 if all(finding.passed for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
