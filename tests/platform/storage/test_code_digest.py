"""The digest of the code that makes numbers changes with that code, and with nothing else."""

from __future__ import annotations

from pathlib import Path

from soflow_platform.storage.code_digest import Code, describe_difference, running_code, source_files


def test_the_code_of_losses_data_metrics_and_training_counts_and_that_of_commands_does_not() -> None:
    files = running_code().files
    for name in (
        "soflow_core/objectives/soflow.py",
        "soflow_core/train_step.py",
        "soflow_pipelines/metrics/fid.py",
        "soflow_platform/training/worker.py",
        "soflow_platform/generation/sampling.py",
    ):
        assert name in files
    assert not [name for name in files if name.startswith("soflow_platform/cli") or "conformance" in name]
    assert running_code().digest == Code(dict(files)).digest


def test_a_change_an_addition_and_a_removal_are_named(tmp_path: Path) -> None:
    for folder in ("losses", "conformance"):
        (tmp_path / folder).mkdir()
    for name in ("a.py", "b.py", "losses/c.py", "conformance/test_a.py", "notes.txt"):
        (tmp_path / name).write_text("x = 1\n")
    before = Code(source_files(tmp_path, "mine"))
    assert set(before.files) == {"mine/a.py", "mine/b.py", "mine/losses/c.py"}
    (tmp_path / "losses" / "c.py").write_text("x = -1\n")
    (tmp_path / "b.py").unlink()
    (tmp_path / "d.py").write_text("")
    (tmp_path / "notes.txt").write_text("changed\n")
    after = Code(source_files(tmp_path, "mine"))
    assert after.digest != before.digest
    assert before.differing(after) == ["mine/b.py", "mine/d.py", "mine/losses/c.py"]


def test_the_first_files_that_differ_are_named_and_the_others_counted() -> None:
    assert describe_difference(["a.py"]) == "a.py differs"
    assert describe_difference(["a.py", "b.py"]) == "a.py, b.py differ"
    assert describe_difference(["a.py", "b.py", "c.py", "d.py"]) == "a.py, b.py, c.py and 1 more differ"
