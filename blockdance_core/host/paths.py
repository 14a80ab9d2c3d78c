"""Where policy files are: `models/blockdance`, and what `extra_model_paths.yaml` names `blockdance`.

Host: folder_paths.py, v0.30.0; the functions used are the same in v0.16.3.
"""

from __future__ import annotations

import os
import re

import folder_paths

_FOLDER = "blockdance"
_ENDING = ".safetensors"
_BYTES = 200
"""A file name may have 255, and what is written beside a policy while it is made has a longer ending."""
_NAME = re.compile(r"[^\W_][\w .+()-]{0,99}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)([. ].*)?", re.IGNORECASE)
"""Names that Windows keeps for itself."""


def register() -> None:
    """Tell the host about the folder; more than once does no harm."""
    folder_paths.add_model_folder_path(_FOLDER, os.path.join(folder_paths.models_dir, _FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[_FOLDER]
    folder_paths.folder_names_and_paths[_FOLDER] = (paths, {_ENDING})


def policy_folders() -> list[str]:
    """Every folder that is looked in, the host's own among them."""
    return list(folder_paths.get_folder_paths(_FOLDER))


def policy_files() -> list[str]:
    """Names of all policy files, relative to their folder, sorted."""
    return list(folder_paths.get_filename_list(_FOLDER))


def policy_path(name: str) -> str:
    """The file of that name.

    Raises:
        FileNotFoundError: None of the folders lists it; the message says where policy files belong.
    """
    path = folder_paths.get_full_path(_FOLDER, name) if name in policy_files() else None
    if path is None:
        raise FileNotFoundError(f"{_missing(name)} Put policy files (.safetensors) into {' or '.join(policy_folders())}, "
                                "then reload the page.")
    return path


def writable_folder() -> str:
    """The first of the folders that can be written, or made.

    Raises:
        PermissionError: None can.
    """
    for folder in policy_folders():
        parent = folder
        while not os.path.exists(parent) and os.path.dirname(parent) != parent:
            parent = os.path.dirname(parent)
        if os.path.isdir(parent) and os.access(parent, os.W_OK | os.X_OK):
            return folder
    raise PermissionError(f"Cannot write into {' or '.join(policy_folders())}: allow it, or name a folder `{_FOLDER}` in "
                          "extra_model_paths.yaml.")


def new_policy_path(name: str) -> str:
    """The file that a policy of this name is written to, in the writable folder itself.

    Raises:
        ValueError: It is no plain file name.
    """
    stem = name.strip().removesuffix(_ENDING).rstrip(". ")
    if not _NAME.fullmatch(stem) or _DEVICES.fullmatch(stem) or len(stem.encode()) > _BYTES:
        raise ValueError(f"policy_name {name[:200]!r} is no file name: expected up to 100 letters, digits, spaces and -_.+() "
                         f"({_BYTES} bytes at most), with a letter or digit first, and no folder.")
    return os.path.join(writable_folder(), stem + _ENDING)


def _missing(name: str) -> str:
    files = policy_files()
    if not files:
        return "There is no policy file."
    return f"There is no policy file {name!r}, only {', '.join(files[:20])}{' ...' if len(files) > 20 else ''}."
