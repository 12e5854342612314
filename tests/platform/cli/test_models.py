"""The registry on the command line: listed, promoted, refused, and restored."""

from __future__ import annotations

import json

import pytest

from soflow_platform.storage.project import ProjectFolder
from tests.support.scored_sweep import SWEEP

FIRST, SECOND = f"{SWEEP}/trial-00-soflow", f"{SWEEP}/trial-01-flow_matching"


def soflowctl(*arguments: str) -> None:
    from soflow_platform.cli.main import app

    app(list(arguments), standalone_mode=False)


def test_models_are_listed_as_a_table_and_as_json(
    scored: ProjectFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    from soflow_platform.errors import UserError

    place = ("--storage", str(scored.root))
    with pytest.raises(UserError, match="there is no registered model in sqlite:"):
        soflowctl("models", *place)
    soflowctl("promote", FIRST, *place)
    capsys.readouterr()
    soflowctl("models", "digits", *place)
    (_, row) = capsys.readouterr().out.strip().splitlines()
    assert row.split()[:4] == ["digits", "1", "candidate,", "champion"]
    assert f"{SWEEP}/trial-00-soflow" in row
    soflowctl("models", "--json", *place)
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["model"], listed["aliases"]) == ("digits", ["candidate", "champion"])


def test_a_forced_promotion_and_its_rollback_are_told(
    scored: ProjectFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    from soflow_platform.errors import UserError

    place = ("--storage", str(scored.root))
    soflowctl("promote", FIRST, *place)
    soflowctl("promote", SECOND, "--force", "people prefer it", *place)
    assert (
        "models:/digits@champion is version 2 (before: version 1): forced: people prefer it"
        in capsys.readouterr().out
    )
    soflowctl("promote", "digits", "--rollback", *place)
    assert "models:/digits@champion is version 1 (before: version 2): rollback" in capsys.readouterr().out
    with pytest.raises(UserError, match="--force needs a reason"):
        soflowctl("promote", SECOND, "--force", " ", *place)
    other = f"sqlite:///{scored.root}/../{scored.root.name}/mlflow.db"
    soflowctl("promote", "models:/digits/2", "--force", "another name", *place, "--tracking", other)
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert command.endswith(f"--storage {scored.root} --tracking {other}")
