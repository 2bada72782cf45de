"""``python -m qflux.demo NAME DIR`` writes a demo; ``python -m qflux.demo run DIR`` takes it from check to report."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from qflux.demo import DEMOS, make
from qflux.errors import QfluxError, UserError
from qflux.io.progress import say


def _call(*words: str) -> None:
    """Run one command of the product, shown as a user would type it."""
    say(f"\n$ python {' '.join(words)}")
    began = time.monotonic()
    code = subprocess.run([sys.executable, *words], check=False).returncode
    say(f"[{time.monotonic() - began:.1f} s]")
    if code:
        raise SystemExit(code)


def run_demo(folder: Path) -> None:
    """check → cache → train → samples → metrics → report, each by its own command."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config}: not there; write it first with: python -m qflux.demo {next(iter(DEMOS))} {folder}")
    command = ("-m", "qflux.main", "--config", str(config))
    _call(*command, "--check")
    _call(*command, "--cache")
    _call(*command)
    newest = max((folder / "runs" / "demo").glob("v*"), key=lambda path: int(path.name[1:]))
    _call("-m", "qflux.main", "--config", str(config), "--sample", "--checkpoint", str(newest))
    _call("-m", "qflux.tools.compare", "base", str(newest), "--out", str(newest / "compare"))
    say(f"\nthe run's report: {newest / 'report.html'}\nbefore against after: {newest / 'compare' / 'report.html'}")


def main(argv: list[str]) -> int:
    """Parse and run; expected failures are one line and code 2."""
    if len(argv) != 2:
        print(f"usage: python -m qflux.demo {{{'|'.join(DEMOS)}|run}} DIR", file=sys.stderr)
        return UserError.exit_code
    name, folder = argv[0], Path(argv[1])
    try:
        if name == "run":
            run_demo(folder)
            return 0
        config = make(name, folder)
    except QfluxError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename}: cannot be written ({error.strerror}); name another folder", file=sys.stderr)
        return UserError.exit_code
    say(
        f"wrote {config}; next: python -m qflux.main --config {config}, or all of it: python -m qflux.demo run {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
