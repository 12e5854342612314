"""The wheel holds the three packages and the sweeps, and works away from the clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (path,) = out.glob("soflow-*.whl")
    return path


def test_the_wheel_holds_three_packages_and_the_sweeps(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "soflow_core",
        "soflow_pipelines",
        "soflow_platform",
    }
    expected = {f"soflow_platform/sweeps/{path.name}" for path in (ROOT / "sweeps").glob("*.yaml")}
    assert expected
    assert expected <= set(names)


def test_the_main_job_is_found_by_name_away_from_the_clone(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import sys, soflow_platform\n"
        f"assert soflow_platform.__file__.startswith({str(site)!r}), soflow_platform.__file__\n"
        "sys.argv = ['soflowctl', 'run', 'digits', '--dry-run']\n"
        "from soflow_platform.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "trial-03-weight_power=1-initial=0.5" in done.stdout
    assert list(elsewhere.iterdir()) == []
