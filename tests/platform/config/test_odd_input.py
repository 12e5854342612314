"""Odd and hostile sweep files: refused in one sentence that names the place, within bounded time, and honest forms are read."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soflow_core.failures import InputError
from soflow_core.objectives import AlphaSchedule
from soflow_platform.config.document import MAX_BYTES, MAX_VALUES, Document, apply_override, read_document
from soflow_platform.config.locations import has_secret
from soflow_platform.config.validation import read_experiment, validate
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training.dataset import expected
from soflow_platform.tuning.search_space import trials
from tests.support.numeric_settings import NumericSetting, numeric_settings
from tests.support.sweep_files import MINIMAL, write


def read_whole(path: Path, *overrides: str) -> None:
    """Read a sweep file as far as `soflowctl validate` does."""
    experiment, document = read_experiment(path, overrides)
    trials(document, experiment)
    expected(experiment)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        read_whole(path, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def test_nested_aliases_are_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, bomb(9))
    assert path.stat().st_size < 500
    begin = time.process_time()
    assert f"more than {MAX_VALUES:,} values" in refusal(path)
    assert time.process_time() - begin < 2


def test_aliases_used_honestly_are_read(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps: 40", "steps: &steps 40").replace("every: 20", "every: *steps")
    experiment, document = read_experiment(write(tmp_path, text))
    assert experiment.evaluation.every == 40
    assert str(document.origin(("evaluation", "every"))).endswith("line 6")


def test_a_large_honest_file_is_read_quickly(tmp_path: Path) -> None:
    values = ", ".join(str(1 + n / 1000) for n in range(900))
    text = MINIMAL + f"search: {{space: {{objective.weight_power: [{values}]}}}}\n"
    write(tmp_path, text, "base.yaml")
    begin = time.process_time()
    document = read_document(write(tmp_path, "extends: base.yaml\nname: other\n"))
    assert len(document.get(("search", "space", "objective.weight_power"))) == 900
    assert time.process_time() - begin < 4


@pytest.mark.parametrize(
    "override",
    ["training.steps=&a [*a]", "search.space=&a {x: *a}", "a=" + "[" * 3000, ".".join("a" * 50) + "=1"],
)
def test_values_that_never_end_are_refused(tmp_path: Path, override: str) -> None:
    assert "deep" in refusal(write(tmp_path, MINIMAL), override)


def test_a_tower_of_extended_files_is_refused(tmp_path: Path) -> None:
    for level in range(12):
        write(tmp_path, f"extends: [f{level + 1}.yaml, f{level + 1}.yaml]\n", f"f{level}.yaml")
    write(tmp_path, MINIMAL, "f12.yaml")
    assert "takes in more than" in refusal(tmp_path / "f0.yaml")


def test_a_file_that_is_too_large_to_be_a_sweep_is_refused(tmp_path: Path) -> None:
    assert "is no sweep file" in refusal(write(tmp_path, "#" * (MAX_BYTES + 1)))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=2001-13-45", "month must be in 1..12"),
        ("seed=" + "9" * 5000, "cannot be read"),
        ("seed=" + "9" * 50, "less than 9223372036854775808"),
        ("seed=!!binary x", "base64"),
        ("description=!!python/object/apply:os.system [x]", "tag"),
        ("training=!!set {a}", "the tag tag:yaml.org,2002:set is not known"),
        ("training={[a]: 1}", "a key is a name"),
        ("objective.method=[]", "unknown method '[]'"),
        ("objective.method={}", "unknown method '{}'"),
        ("network.depth=1000000", "less than or equal to 1024"),
        ("network.hidden=1000000000", "less than or equal to 65536"),
        ("training.batch=1000000000", "less than or equal to 1048576"),
        ("search={algorithm: random, trials: 100000000}", "less than or equal to 1000"),
        ("description=" + "x" * 100_000, "at most 4096 characters"),
        ("registry.model=a/b:c", "not / or :"),
        ("registry.model=''", "a registered model's name"),
        ("registry.model=..", "a registered model's name"),
        ("tracking.experiment=''", "at least 1 character"),
        ("training.checkpoints=/etc/passwd", "/etc/passwd is a file: give a folder"),
        ("training.checkpoints=/etc/passwd/below", "/etc/passwd is a file: give a folder"),
        ("data.shape=[1, 100000, 100000]", "data.source digits has (1, 8, 8)"),
        ("data.classes=11", "data.source digits has 10"),
    ],
)
def test_a_value_that_could_not_be_run_is_refused(tmp_path: Path, override: str, says: str) -> None:
    assert says in refusal(write(tmp_path, MINIMAL), override)


NUMBERS = numeric_settings()
NO_NUMBERS = [".nan", ".inf", "-.inf", "1e400", "-1e400", "'inf'", "'1e400'", "true", "many", "[]", "1:30"]
LARGE = [10**30, -(10**30), 10**400]


def of_method(folder: Path, setting: NumericSetting) -> Path:
    return write(folder, MINIMAL.replace("method: soflow", f"method: {setting.method}"))


def test_the_numbers_of_the_schema_are_found() -> None:
    found = {".".join(number.path) for number in NUMBERS}
    assert {"seed", "optimizer.betas.[]", "objective.times.velocity.mean", "training.ema.[]"} <= found
    assert {"comparison.[].steps.[]", "registry.gate.guards.[].limit", "data.shape.[]"} <= found
    assert len(NUMBERS) > 140


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_no_number_is_infinite_or_something_else(tmp_path: Path, number: NumericSetting) -> None:
    path = of_method(tmp_path, number)
    for value in NO_NUMBERS:
        override = number.override(value)
        with pytest.raises(InputError) as caught:
            read_experiment(path, (override,))
        sentence = str(caught.value)
        assert sentence.startswith(f"--set {override.partition('=')[0]}"), sentence
        assert number.key in sentence
        assert len(sentence) < 400


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_a_number_in_quotes_or_of_any_size_is_that_number_or_refused(
    tmp_path: Path, number: NumericSetting
) -> None:
    path = of_method(tmp_path, number)
    for value in (*LARGE, 0, 1, 0.5, 16):
        plain, quoted = (number_read(path, number, text) for text in (str(value), f"'{value}'"))
        assert plain == quoted
        assert plain is None or plain == number.kind(value)
    assert str(number_read(path, number, "-0.0")) in ("0", "0.0", "None")


def number_read(path: Path, number: NumericSetting, text: str) -> object:
    """What is read of a number written so; None where it is refused in a short sentence."""
    try:
        return number.value(read_experiment(path, (number.override(text),))[0])
    except InputError as error:
        refused = str(error)
    assert len(refused) < 400
    return None


def test_a_number_with_a_leading_zero_is_decimal(tmp_path: Path) -> None:
    experiment, _ = read_experiment(write(tmp_path, MINIMAL), ("training.steps=040", "evaluation.every=0x10"))
    assert (experiment.training.steps, experiment.evaluation.every) == (40, 16)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "objective: {weight_eps: 0}",
            "over.yaml, line 3: `objective`: weight_eps is 0.0; it must be above 0",
        ),
        ("objective: {sampling_times: [2]}", "over.yaml, line 3: `objective`: sampling_times are 2"),
        (
            "network: {heads: 3}",
            "over.yaml, line 3: `network`: `hidden` (32) must be a multiple of `heads` (3)",
        ),
        ("evaluation: {every: 50}", "over.yaml, line 3: evaluation.every (50) is beyond training.steps (40)"),
        ("training: {steps: 10}", "over.yaml, line 3: evaluation.every (20) is beyond training.steps (10)"),
        (
            "resources: {workers: 3}",
            "over.yaml, line 3: training.batch (16) does not divide over 3 worker(s)",
        ),
        (
            "search: {space: {optimizer.lr: []}}",
            "over.yaml, line 3: `search`: `optimizer.lr` lists no values",
        ),
        ("comparison: [{steps: [1], samples: true}]", "over.yaml, line 3: `comparison.0.samples` is True"),
        (
            "comparison: [{steps: [1], sample: 3}]",
            "over.yaml, line 3: unknown key `sample` in `comparison.0`",
        ),
    ],
)
def test_a_sentence_names_the_line_of_the_value_and_not_of_the_extended_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    search = "search: {space: {optimizer.lr: [0.1]}}\n"
    write(tmp_path, MINIMAL + search, "base.yaml")
    assert refusal(write(tmp_path, f"extends: base.yaml\n\n{line}\n", "over.yaml")).startswith(says)


def test_an_override_is_named_rather_than_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert refusal(path, "objective.weight_eps=0").startswith("--set objective.weight_eps: ")
    assert refusal(path, "optimizer.eps=-1").startswith(
        "--set optimizer.eps: `optimizer`: optimizer.eps is -1"
    )


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.weight_decay=-1",
        "objective={method: diffusion, diffusion_steps: 1000000000000}",
        "objective={method: ict, last_levels: 1000000000000}",
        "objective={method: ict, rho: 0}",
        "objective={method: ect, huber: -1}",
        "objective={method: ect, stages: 1000000000000}",
        "objective={method: shortcut, teacher_ema: 1}",
        "objective={method: shortcut, drop: 1}",
        "objective={method: alphaflow, schedule: {snap: 1}}",
        "objective={method: alphaflow, schedule: {steepness: 0}}",
    ],
)
def test_a_number_with_which_no_training_starts_is_refused(tmp_path: Path, setting: str) -> None:
    assert refusal(write(tmp_path, MINIMAL), setting).startswith("--set ")


def test_the_steepest_schedule_is_a_step() -> None:
    schedule = AlphaSchedule(steepness=1e30)
    assert [schedule.alpha(step, 4) for step in range(4)] == [1, 1, 0.5, 0]


def test_a_range_that_is_infinite_is_refused(tmp_path: Path) -> None:
    space = "search={algorithm: random, trials: 2, space: {objective.weight_power: {uniform: [0, .inf]}}}"
    assert "finite number" in refusal(write(tmp_path, MINIMAL), space)
    listed = "search.space={objective.weight_power: [.nan, 1]}"
    assert "`objective.weight_power` is nan" in refusal(write(tmp_path, MINIMAL), listed)


@pytest.mark.parametrize("count", [1001, 40])
def test_a_grid_of_too_many_points_is_refused(tmp_path: Path, count: int) -> None:
    values = list(range(1, count + 1))
    space = {"objective.weight_power": values, "optimizer.lr": values if count == 40 else [1]}
    assert "at most 1000 trials" in refusal(write(tmp_path, MINIMAL), f"search.space={space}")


SECRET_URIS = [
    "http://u:secretpw@h:5000",
    "http://secretpw@h:5000",
    "https://h/x?token=secretpw",
    "https://h/x?api_key=secretpw",
    "postgresql://u:secretpw@h/db",
    "postgresql+psycopg2://u:secretpw@h:1/db",
    "postgresql://u:secret/pw@h/db",
    "postgresql://h/db?user=u&password=secretpw",
    "mysql://u:secretpw@h/db",
]


@pytest.mark.parametrize("uri", SECRET_URIS)
def test_a_tracking_uri_with_a_secret_is_refused_and_not_shown(tmp_path: Path, uri: str) -> None:
    for sentence in (
        refusal(write(tmp_path, MINIMAL), f"tracking.uri='{uri}'"),
        refusal(write(tmp_path, MINIMAL + f"tracking: {{uri: '{uri}'}}\n")),
    ):
        assert "MLFLOW_TRACKING_PASSWORD" in sentence
        assert "secret" not in sentence
    with pytest.raises(InputError, match="PGPASSWORD") as caught:
        TrackingStore(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://KEY:secretpw@bucket/p", "s3://bucket/p?secret_key=secretpw"])
def test_a_checkpoint_place_with_keys_is_refused_and_not_shown(tmp_path: Path, uri: str) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), f"training.checkpoints={uri}")
    assert "AWS_SECRET_ACCESS_KEY" in sentence
    assert "secretpw" not in sentence


@pytest.mark.parametrize(
    "uri",
    [
        "http://h:5000",
        "postgresql://u@h:5432/db",
        "sqlite:////x/y@z:1/mlflow.db",
        "s3://b/p?endpoint_override=h:1",
    ],
)
def test_a_uri_without_a_secret_is_taken(uri: str) -> None:
    assert not has_secret(uri)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["&a", "*a", "<<", "!!set"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=8), below, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        *(".".join(number.path) for number in NUMBERS),
        "name",
        "data",
        "network",
        "objective.method",
        "search.space",
        "tracking.uri",
        "training.ema",
    ]
)
FUZZ = settings(max_examples=150, derandomize=True, deadline=2000, suppress_health_check=list(HealthCheck))


@FUZZ
@given(key=KEYS, value=VALUES)
def test_any_value_of_a_setting_is_read_or_refused(tmp_path: Path, key: str, value: object) -> None:
    path = write(tmp_path, MINIMAL)
    document = read_document(path)
    with contextlib.suppress(InputError):
        apply_override(document, f"{key}={value}")
        trials(document, validate(document))


@FUZZ
@given(text=st.text(max_size=200) | st.text(alphabet="&*[]{}:,-'\"|>!%@`?# \nab01.", max_size=80))
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        read_experiment(path)
    with contextlib.suppress(InputError):
        apply_override(Document({}), text)
