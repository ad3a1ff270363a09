"""What memory a process holds, as the Linux kernel counts it."""

import re
from pathlib import Path


def resident(which: str, pid: int | None = None) -> int:
    """Bytes of a process, by default this one; 0 if it has ended.

    VmRSS    now
    VmHWM    at most so far. What `getrusage` says would begin with the peak of the process that started this one
    RssAnon  now, but for what files can take back
    """
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(rf"^{which}:\s*(\d+) kB", status, re.MULTILINE)  # not of a zombie
    return 1024 * int(found[1]) if found else 0
