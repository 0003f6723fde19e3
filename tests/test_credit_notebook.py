"""The credit notebook runs from top to bottom and shows what its text says."""

import pathlib

import matplotlib
import nbformat
import numpy as np

NOTEBOOK = pathlib.Path(__file__).resolve().parent.parent / "colab" / "credit.ipynb"


def test_the_credit_notebook_runs_and_its_text_is_true():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    names = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, cell.id, "exec"), names)
    plt.close("all")

    mask = np.asarray(names["action_mask"][0])
    won = {name: np.asarray(advantage[0]) for name, advantage in names["credit"].items()}
    assert len(won) == 8
    for advantage in won.values():
        assert np.all(advantage[~mask] == 0)
        assert np.all(np.isfinite(advantage))
    per_token, per_turn = won["gae, λ = 0.5"], won["turn_gae, λ = 0.5"]
    assert per_token[8] < per_token[11] / 4  # fades within the turn
    assert per_turn[8] == per_turn[11]
    assert len(set(won["leave_one_out"][mask].tolist())) == 1
    assert won["rewards_to_go_group"][0] > won["rewards_to_go_group"][8]
    # The third observations differ, so the last turn has only the episode's credit.
    assert won["gigpo, ω = 1"][8] < won["gigpo, ω = 1"][5]
