"""Packs files into an initramfs: a gzipped cpio archive of the kernel's `newc` format."""

import gzip
import stat
from pathlib import PurePosixPath


def _entry(number, name, mode, data):
    """Header of 14 eight-digit hexadecimal fields, name and data, each padded to four bytes."""
    encoded = name.encode() + b"\0"
    fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def initramfs(files, texts, links):
    """The archive. `files`: path inside to a file here; `texts`: path to content; `links`: path to target. All executable."""
    contents = {name: (stat.S_IFREG | 0o755, path.read_bytes()) for name, path in files.items()}
    contents |= {name: (stat.S_IFREG | 0o755, text.encode()) for name, text in texts.items()}
    contents |= {name: (stat.S_IFLNK | 0o777, target.encode()) for name, target in links.items()}
    folders = {str(parent) for name in contents for parent in PurePosixPath(name).parents} - {"."}
    folders |= {"dev", "proc", "sys", "tmp"}
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in sorted(folders)]
    entries += [(name, mode, data) for name, (mode, data) in sorted(contents.items())]
    archive = b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1))
    return gzip.compress(archive + _entry(0, "TRAILER!!!", 0, b""), compresslevel=1)
