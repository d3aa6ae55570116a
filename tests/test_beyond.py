"""Questions beyond the paper: their plans, predictors that move, and stored results that stay."""

import pandas as pd
import pytest

from amedlib.datasets.files import DATA
from amedlib.recipes import Training
from amedlib.study import execute, plans
from amedlib.study.run import Run
from amedlib.study.store import load_result, predictor_path, result_path
from amedlib.trained import load_predictor

SAMPLES = {"n_samples": 5000}


@pytest.mark.parametrize(
    "method, nfe, key, predictor",
    [
        ("iPNDM", 5, "7054411a2b6c4cd9", None),
        ("AMED-Solver", 5, "283b23738c45a354", "3e23b579ccfdf601"),
        ("AMED-Solver", 7, "beafdba1438294da", "3742459b0752844e"),
        ("AMED-Plugin", 5, "a79448e018fd967a", "35499b46f436c9e7"),
        ("AMED-Plugin", 7, "66f0a6094be19e4c", "6639d864a8be4de6"),
    ],
)
def test_stored_results_and_predictors_keep_their_names(method, nfe, key, predictor):
    (what,) = plans.table2("digits", [method], [nfe], seeds=[0], **SAMPLES)["run"]
    assert what.key == key
    assert load_result(what) is not None
    if predictor:
        path = predictor_path(what)
        assert path.stem == predictor
        assert load_predictor(path, what.training).form == "paper"


def test_a_predictor_of_another_nfe_is_named_by_the_run():
    own, moved = (
        plans.beyond("transfer", nfes=[7], seeds=[0], **SAMPLES)
        .query("method == 'AMED-Plugin'")["run"]
        .tolist()
    )
    (source,) = plans.table2("digits", ["AMED-Plugin"], [5], seeds=[0], **SAMPLES)["run"]
    assert own.num_steps == own.training.num_steps == moved.num_steps == 5
    assert moved.training == source.training
    assert predictor_path(moved) == predictor_path(source) != predictor_path(own)
    assert len({own.key, moved.key, source.key}) == 3
    assert moved == Run(**vars(moved))


def test_the_number_of_steps_of_its_own_is_not_named():
    (what,) = plans.table2("digits", ["AMED-Solver"], [5], seeds=[0], **SAMPLES)["run"]
    assert "num_steps" not in what.predictor
    assert Run(**vars(what) | {"predictor": what.predictor | {"num_steps": 4}}) == what


def test_a_table_serves_no_other_nfe():
    table = plans.FREE_R | {"recipe": "paper", "num_steps": 4}
    with pytest.raises(ValueError, match="num_steps of predictor must be the Run's own, 5, in the"):
        Run(solver="amed", afs=True, nfe=7, predictor=table)


def test_a_moved_predictor_is_trained_once_and_its_r_follows_the_times(tmp_path):
    learned = {"recipe": "paper", "images": 4, "batch": 4, "num_steps": 3}
    fields = {"metric": "learned_r", "solver": "amed", "afs": True, "samples": 20}
    rows = []
    for nfe in (3, 5, 7):
        found = execute.run(Run(nfe=nfe, predictor=learned, **fields), tmp_path, progress=False)
        rows.append(found.curves["r"])
    assert [len(r) for r in rows] == [2, 3, 4]
    assert len(list((tmp_path / "digits" / "predictors").iterdir())) == 1
    # The first step is at the same time everywhere and sees no bottleneck.
    assert rows[0][0] == pytest.approx(rows[1][0]) == pytest.approx(rows[2][0])


@pytest.mark.parametrize("question", plans.QUESTIONS)
def test_every_question_starts_from_the_row_of_table_2(question):
    planned = plans.beyond(question, seeds=[0], **SAMPLES)
    asked = plans.QUESTIONS[question]
    assert len(planned) == len(asked.names) * len(asked.nfes) * len(asked.variants)
    assert planned["run"].map(lambda what: what.key).is_unique
    first = planned[
        planned["variant"].isin([v for v, fields in asked.variants.items() if not fields])
    ]
    for row in first.itertuples():
        (what,) = plans.table2(
            asked.dataset or "digits", [row.method], [row.nfe], seeds=[0], **SAMPLES
        )["run"]
        assert row.run == what


def test_an_unknown_question_is_refused():
    with pytest.raises(ValueError, match="question must be one of 'objective', 'greedy'"):
        plans.beyond("colour")


def test_a_free_table_has_a_number_per_step():
    sizes = {}
    for row in plans.beyond("parameters", seeds=[0]).itertuples():
        predictor = load_predictor(predictor_path(row.run), row.run.training)
        sizes[row.method, row.variant] = sum(p.numel() for p in predictor.parameters())
    assert {size for (_, variant), size in sizes.items() if variant == "table"} == {3}
    assert all(size > 2_000 for (_, variant), size in sizes.items() if variant == "network")


def test_results_from_before_the_new_fields_are_found():
    assert Training().objective == "step"
    assert all(load_result(what) is not None for what in plans.table2("digits")["run"])


def test_every_run_of_the_questions_is_stored():
    missing = [
        result_path(what).name
        for question in plans.QUESTIONS
        for what in plans.beyond(question)["run"]
        if load_result(what) is None
    ]
    assert not missing


def test_numbers_of_the_field_since():
    frame = pd.read_csv(DATA / "paper" / "successors.csv")
    assert list(frame) == ["method", "venue", "year", "dataset", "nfe", "FID", "note", "source"]
    assert frame.notna().all(axis=None)
    assert frame["year"].between(2023, 2025).all()
    (ours,) = frame[frame["method"] == "AMED-Plugin (iPNDM)"].itertuples()
    versions = pd.read_csv(DATA / "paper" / "versions.csv")
    final = versions.query("dataset == 'cifar10' and nfe == 5").set_index("method")["final"]
    assert ours.FID == final["AMED-Plugin (iPNDM)"]
