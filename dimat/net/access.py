"""Who may get at a file, where its mode alone does not tell: a POSIX access control list (ACL).

A service manager hands over a credential (systemd's `LoadCredential=`) as a file of root's with an entry for the
service's user. The mode then shows as the group's right what is the list's mask, the most that any entry can give:
0440, though no group may read it. Reference: acl(5); the layout is that of linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import os
import struct

ATTRIBUTE = "system.posix_acl_access"
VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
"""Kinds of entries: the owner, a named user, the file's group, a named group, the mask, everybody else."""


def only_ours(descriptor: int, mode: int) -> bool:
    """Whether an open file's ACL lets nobody in but its owner, this process's user and root. False where it has no ACL,
    or none that is understood; then its `mode` says all there is to say."""
    if mode & 0o007 or not hasattr(os, "getxattr"):
        return False
    try:
        data = os.getxattr(descriptor, ATTRIBUTE)
    except OSError:  # no list, or a file system without any
        return False
    if len(data) % 8 != 4 or struct.unpack_from("<I", data)[0] != VERSION:
        return False
    entries: list[tuple[int, int, int]] = list(struct.iter_unpack("<HHI", data[4:]))
    us = (0, os.geteuid())
    return all(
        not rights or kind in (USER_OBJ, MASK) or (kind == USER and user in us) for kind, rights, user in entries
    )
