"""What the C library's allocator of this process has given out."""

import ctypes


class _State(ctypes.Structure):
    """`struct mallinfo2` of glibc's <malloc.h>: ten numbers, of which two are used."""

    _fields_ = [
        ("before", ctypes.c_size_t * 4),
        ("mapped", ctypes.c_size_t),
        ("between", ctypes.c_size_t * 2),
        ("in_heaps", ctypes.c_size_t),
        ("after", ctypes.c_size_t * 2),
    ]


_library = ctypes.CDLL(None)
_library.mallinfo2.restype = _State


def mapped() -> int:
    """Bytes in blocks that it mapped one by one, and unmaps when they are freed."""
    return _library.mallinfo2().mapped


def allocated() -> int:
    """Bytes in blocks of any size."""
    state = _library.mallinfo2()
    return state.mapped + state.in_heaps
