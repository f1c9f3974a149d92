import pytest

from resae.evaluation.labels import LABELS
from resae.reproduce.jobs import MAPS_ALONE, METHODS, Job, Kind, jobs_of, needs, selected, sweeps_of
from resae.reproduce.settings import MODELS, Spacing, StudyConfig, model_path

CONFIG = StudyConfig("smollm2-135m")
JOBS = jobs_of(CONFIG)


def test_every_method_is_there_in_every_setting_and_the_headline_with_both_seeds():
    evaluated = {(j.spacing, j.k, j.method, j.seed) for j in JOBS if j.kind is Kind.EVALUATE}
    expected = {(s, k, m, 0) for s in Spacing for k in (16, 32, 64) for m in METHODS}
    expected |= {
        (s, 32, m, 1)
        for s in Spacing
        for m in ("raw", "raw_equal_total", "identity_closed", "resae_closed")
    }
    expected |= {(s, 0, MAPS_ALONE, 0) for s in Spacing}
    assert evaluated == expected
    assert {*METHODS, MAPS_ALONE} <= set(LABELS)
    assert len({job.name for job in JOBS}) == len(JOBS) == len(set(JOBS))


def test_a_job_comes_after_all_that_it_needs():
    before: set[Job] = set()
    for job in JOBS:
        assert before >= set(needs(job, CONFIG)), job.name
        before.add(job)


def test_the_most_telling_comparison_comes_first():
    order = [j.name for j in JOBS if j.kind is Kind.EVALUATE]
    assert order[:5] == [
        "evaluate-far-raw-k32-seed0",
        "evaluate-far-resae_closed-k32-seed0",
        "evaluate-far-affine_only",
        "evaluate-far-identity_closed-k32-seed0",
        "evaluate-far-raw_equal_total-k32-seed0",
    ]
    places = [
        next(i for i, name in enumerate(order) if set(words) <= set(name.split("-")))
        for words in (("near",), ("seed1",), ("k16",), ("resae",))
    ]
    assert places == sorted(places)


def test_a_learning_rate_is_swept_once_per_method():
    sweeps = [job for job in JOBS if job.kind is Kind.SWEEP]
    assert sweeps == [
        s for m in dict.fromkeys(j.method for j in sweeps) for s in sweeps_of(m, CONFIG)
    ]
    assert {(s.spacing, s.k, s.seed) for s in sweeps} == {("far", 32, 0)}


def test_selected_jobs_bring_those_that_they_need():
    chosen = selected(JOBS, ("near", "raw", "k16"), CONFIG)
    assert [job.name for job in chosen] == [
        "capture",
        "maps-far",
        *(f"sweep-far-raw-k32-seed0-lr{factor:g}" for factor in CONFIG.lr_factors),
        "maps-near",
        "train-near-raw-k16-seed0",
        "evaluate-near-raw-k16-seed0",
    ]
    assert selected(JOBS, (), CONFIG) == JOBS
    with pytest.raises(ValueError, match="no job has magic in its name; words are capture, maps"):
        selected(JOBS, ("magic",), CONFIG)


def test_layers_are_2_blocks_and_a_third_of_the_depth_apart():
    for name, depth in (("tiny", 8), ("smollm2-135m", 30), ("gemma-3-270m", 18)):
        far, near = MODELS[name]
        assert {b - a for a, b in zip(near, near[1:], strict=False)} == {2}
        assert {b - a for a, b in zip(far, far[1:], strict=False)} == {round(depth / 3)}
        assert max(far) < depth - 1
        assert set(StudyConfig(name).captured_blocks) == {*far, *near}


@pytest.mark.parametrize(
    "setting",
    [{"name": "gpt"}, {"k": (8, 4)}, {"train_tokens": 4_095}, {"documents": 1}],
    ids=str,
)
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ValueError, match=r"^reproduce: .*(expected|choose)"):
        StudyConfig(**{"name": "tiny"} | setting)


def test_a_missing_model_is_an_error_that_says_how_to_fetch_it(tmp_path):
    assert model_path("tiny", None) == "embedded"
    assert model_path("gemma-3-270m", str(tmp_path)) == str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"real_models.py fetch gemma-3-270m`, or name a"):
        model_path("gemma-3-270m", str(tmp_path / "none.gguf"))
