"""The rows of a GPU's report: in which order, of which time, and what is paused meanwhile."""

from __future__ import annotations

from par_export.card.plan import MODELS, Figure, blocks


def test_the_plan_has_every_model_at_batch_1_first_and_figures_that_it_measures() -> None:
    planned_blocks = blocks(MODELS)
    images = [block.images for block in planned_blocks]
    assert images == sorted(images)
    assert planned_blocks[0].name == "PAR-3B, batch 1"
    assert MODELS[0].labels == [
        "PAR-3B n=4", "PAR-3B n=16", "PAR-3B n=1", "PAR-3B n=4 int8 group 64", "PAR-3B n=4 int4 group 64"
    ]  # fmt: skip
    assert sum(bool(model.codes) for model in MODELS) == 2
    from par_export.card.plan import FIGURES

    models = {model.name: model for model in MODELS}
    for figure in FIGURES:
        assert isinstance(figure, Figure)
        assert figure.n in models[figure.model].group_sizes
        if figure.what in ("eager", "compiled"):
            assert figure.n in models[figure.model].twins
