"""Odd and hostile sweep files: refused in one sentence that names the place, within bounded time, and honest forms are read."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soflow_core.failures import InputError
from soflow_platform.config.document import MAX_BYTES, MAX_VALUES, Document, apply_override, read_document
from soflow_platform.config.locations import has_secret
from soflow_platform.config.validation import read_experiment, validate
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training.dataset import expected
from soflow_platform.tuning.search_space import trials

MINIMAL = """\
name: small
data: {source: digits}
network: {patch: 2, hidden: 32, depth: 2, heads: 2}
objective: {method: soflow}
training: {steps: 40, batch: 16}
evaluation: {every: 20}
"""


def write(folder: Path, text: str, name: str = "sweep.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


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


NUMBERS = [
    "seed",
    "objective.weight_power",
    "objective.guidance.scale",
    "objective.times.velocity.mean",
    "optimizer.lr",
    "optimizer.weight_decay",
    "training.batch",
    "training.clip_norm",
    "training.grace_seconds",
    "training.patience_minutes",
    "resources.cpus_per_worker",
    "resources.gpus_per_worker",
    "resources.wait_minutes",
    "evaluation.samples",
    "data.scaling",
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400", "true", "many", "[]", "{}"])
def test_no_number_is_infinite_or_something_else(tmp_path: Path, key: str, value: str) -> None:
    sentence = refusal(write(tmp_path, MINIMAL), f"{key}={value}")
    assert sentence.startswith(f"--set {key}")
    assert key.rpartition(".")[2] in sentence


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_in_quotes_is_that_number(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, MINIMAL)
    value = "32" if key in ("training.batch", "evaluation.samples") else "1"
    plain, quoted = (read_experiment(path, (f"{key}={v}",))[0] for v in (value, f"'{value}'"))
    assert plain == quoted


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
    [*NUMBERS, "name", "data", "network", "objective.method", "search.space", "tracking.uri", "training.ema"]
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
