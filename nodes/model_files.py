"""The files that loader nodes list, by ComfyUI's folders, and where each lies."""

from __future__ import annotations

GGUF = ".gguf"


def gguf_folders() -> tuple[str]:
    """ComfyUI lists no GGUF files by itself. The name is the one under which other packs list them."""
    import folder_paths

    known = folder_paths.folder_names_and_paths
    if "unet_gguf" not in known:
        known["unet_gguf"] = (list(known["diffusion_models"][0]), {GGUF})
    return ("unet_gguf",)


def file_names(folders: tuple[str, ...]) -> list[str]:
    """What ComfyUI lists there, each name once."""
    import folder_paths

    return list(dict.fromkeys(name for folder in folders for name in folder_paths.get_filename_list(folder)))


def path_of(name: str, folders: tuple[str, ...]) -> str:
    """Of the first folder that has it. Raises FileNotFoundError."""
    import folder_paths

    for folder in folders[:-1]:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    return folder_paths.get_full_path_or_raise(folders[-1], name)
