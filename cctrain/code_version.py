"""Which code this is: the commit of the checkout that cctrain runs from, what differs from it, and a digest that
needs no git."""

import hashlib
import os
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parent
# Some tools note the commit with every row that they add to a file in here: it must not change with the file.
RESULTS = "tools/results"


def code_commit() -> str | None:
    """The commit, with a digest of the difference if there is one; None if cctrain is not run from a checkout."""
    commit = _git("rev-parse", "HEAD")
    # An installed cctrain may lie inside somebody else's checkout.
    if commit is None or _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    difference = code_difference()
    return commit.strip() + (f"+{hashlib.sha256(difference.encode()).hexdigest()[:12]}" if difference else "")


def code_difference() -> str:
    """What the working tree changes in files that git knows, but for kept results, which are no code, and cctrain's
    files that it does not know yet, as a patch; "" without a checkout."""
    root = Path((_git("rev-parse", "--show-toplevel") or "").strip() or PACKAGE)
    new = (_git("ls-files", "--others", "--exclude-standard", "--full-name", "-z") or "").split("\0")
    patches = [
        _git("diff", "--no-index", "--", os.devnull, name, folder=root, fails_with=1) or ""
        for name in sorted(filter(None, new))
    ]
    return "".join([_git("diff", "HEAD", "--", ":(top)", f":(top,exclude){RESULTS}") or "", *patches])


def code_digest() -> str:
    """SHA-256 over cctrain's source files: the same wherever the same code is installed, with git or without."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _git(*arguments: str, folder: Path | None = None, fails_with: int = 0) -> str | None:
    """What git says in a folder, the package's; None if it cannot be asked. Some of its commands answer with 1, too."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder or PACKAGE), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode in (0, fails_with) else None
