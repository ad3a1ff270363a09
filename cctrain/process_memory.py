"""What memory a process holds, as the Linux kernel counts it."""

import re

_COUNT = re.compile(rb"^(VmRSS|VmHWM|RssAnon):\s*(\d+) kB", re.MULTILINE)


def memory_of(pid: int | None = None) -> dict[str, int]:
    """Bytes of a process, by default this one, by the kernel's names; {} if it has ended.

    VmRSS    now
    VmHWM    at most so far. What `getrusage` says would begin with the peak of the process that started this one
    RssAnon  now, but for what files can take back
    """
    try:
        with open(f"/proc/{pid or 'self'}/status", "rb", buffering=0) as file:
            counts = _COUNT.findall(file.read())  # none of a zombie
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name.decode(): 1024 * int(kilobytes) for name, kilobytes in counts}


def resident(which: str, pid: int | None = None) -> int:
    """One of these; 0 if the process has ended."""
    return memory_of(pid).get(which, 0)
