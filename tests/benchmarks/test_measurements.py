"""Measurements are compared with those of another run: what differs by more than the noise of both is named."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from all import BENCHMARKS
from measurements import Results, moved


def results(**values: float) -> Results:
    made = Results("run", {"torch": "2"})
    for name, value in values.items():
        made.add("steps", name, [0.95 * value, value, 1.05 * value], "ms", "lower")
    return made


def test_what_moved_beyond_its_noise_is_named_and_the_rest_is_not(tmp_path: Path) -> None:
    before = results(same=100.0, slower=100.0, faster=100.0, gone=1.0)
    before.write(tmp_path / "before.json")
    now = results(same=108.0, slower=130.0, faster=70.0, added=2.0)
    assert moved(Results.read(tmp_path / "before.json"), now) == [
        "steps: slower: 100 -> 130 ms (+30.0 %), WORSE",
        "steps: faster: 100 -> 70 ms (-30.0 %), better",
        "steps: added: 2 ms (new)",
        "steps: gone: no longer measured",
    ]


def test_exact_numbers_move_by_more_than_two_percent() -> None:
    before, now = Results("a", {}), Results("a", {})
    before.add("parity", "loss", 1.0)
    now.add("parity", "loss", 1.01)
    assert moved(before, now) == []
    assert moved(before, before) == []
    now.measurements.clear()
    now.add("parity", "loss", 1.03)
    assert moved(before, now) == ["parity: loss: 1 -> 1.03  (+3.0 %)"]


def test_the_table_has_every_number_and_what_was_left_out() -> None:
    made = results(one=2.0)
    made.skipped["step of XL/2"] = "no time was left"
    text = made.markdown()
    assert "| one | 2 ms | 5.0 % |" in text
    assert "| step of XL/2 | no time was left |" in text


def test_numbers_are_read_from_tables_and_lines() -> None:
    from all import numbers

    text = (
        "S/8, batch 4\n| step | s | of plain | F |\n|---|---|---|---|\n| plain | 0.030 | 1.000 | - |\n\n"
        "time of soflow / plain = 1.48, bar 1.55: holds\n        memmap, float32    12,345     0.88\n"
        "2026-01-02T03:04:05Z  checkpoint of step 100\n"
    )
    assert list(numbers(text)) == [
        ("S/8, batch #", 4.0),
        ("plain, s", 0.03),
        ("plain, of plain", 1.0),
        ("time of soflow / plain = #", 1.48),
        ("memmap, float32 # # [1]", 12345.0),
        ("memmap, float32 # # [2]", 0.88),
    ]


def test_a_number_is_named_by_heading_row_and_column() -> None:
    from all import numbers

    steps = "| GPUs | batch 256: step ms, images/s, efficiency |\n|---|---|\n| 8 | 131.9, 1,941, 98% |\n"
    data = "| GPUs | batch | MB/s |\n|---|---|---|\n| 8 | 256 | 12.5 |\n| 8 | 4096 | 20 |\n"
    loops = "| loop | s/step |\n|---|---|\n| bare | 0.5 |\n| platform | 0.6 |\n| bare | 0.7 |\n"
    assert list(numbers(f"\n## Fast\n\n{steps}\n## Slow\n\n{steps}\n## Data\n\n{data}\n{loops}")) == [
        ("Fast: GPUs 8, batch 256: step ms, images/s, efficiency", 131.9),
        ("Slow: GPUs 8, batch 256: step ms, images/s, efficiency", 131.9),
        ("Data: GPUs 8, batch 256, MB/s", 12.5),
        ("Data: GPUs 8, batch 4096, MB/s", 20.0),
        ("Data: bare, s/step", 0.5),
        ("Data: platform, s/step", 0.6),
        ("Data: bare, s/step (2)", 0.7),
    ]


def test_times_beside_other_programs_are_not_compared_and_exact_numbers_are() -> None:
    from all import comparable

    before, now = Results("before", {}), Results("now", {})
    for each in (before, now):
        for section in ("scaling", "step", "fid"):
            each.add(section, "number", 1.0)
    now.others = {"scaling": 0.9, "step": 0.9, "fid": 0.02}
    kept, note = comparable(before, now)
    assert [each.section for each in kept.measurements] == ["scaling", "fid"]
    assert note == " (not compared, for other programs were at work: step)"
    assert comparable(now, before) == (Results("now", {}, kept.measurements), note)


def test_every_benchmark_is_run_or_says_why_not() -> None:
    from all import BENCHMARKS, FINISHED

    root = Path(__file__).parents[2]
    scripts = {path.stem for path in (root / "benchmarks").glob("*.py") if "def main(" in path.read_text()}
    assert scripts - {"all", "gpu_suite", "scaling_workers"} == BENCHMARKS.keys() | FINISHED.keys()


def test_the_page_has_the_table_of_the_newest_results() -> None:
    """docs/performance.md is written from benchmarks/results/, not by hand."""
    from all import BENCHMARKS, PAGE, newest, page_table, written

    path = newest(set(BENCHMARKS) - {"step", "loader"})
    assert path is not None
    made = Results.read(path)
    assert written(PAGE.read_text(), page_table(made)) == PAGE.read_text()
    kept = {(each.section, each.name) for each in made.measurements}
    shown = {(name, label) for name, small in BENCHMARKS.items() for label in small.shown}
    assert len(shown) > 10
    assert shown <= kept


def test_results_tell_no_place_of_the_machine() -> None:
    from all import RESULTS

    for path in RESULTS.glob("bench-*.json"):
        text = path.read_text()
        assert not any(place in text for place in ("/tmp", "/home", "/root", "/work", "localhost"))


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_benchmark_understands_its_small_form(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its arguments and one that no benchmark has, that one alone is refused."""
    arguments = [*BENCHMARKS[name].arguments.split(), "--no-such-option"]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as end:
        import_module(name).main()
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith("error: unrecognized arguments: --no-such-option")
