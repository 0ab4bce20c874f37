"""LoRA files that a prompt asks for, as A1111's users write it: `a cat <lora:fur:0.7>`.

The name is that of a .safetensors file in a folder, or its path there without the ending. The tag
is taken out of the prompt, and the file acts on that image alone. Negative prompts have none.

Source: AUTOMATIC1111's stable-diffusion-webui, modules/extra_networks.py.
"""

from __future__ import annotations

from pathlib import Path

from latentdiff.errors import UserError, did_you_mean, some
from latentdiff.models.prompts import NETWORK

#: Files and their weights.
Files = tuple[tuple[Path, float], ...]
_ENDING = ".safetensors"


class LoraFolder:
    """The files of a folder by the names that prompts use.

    Raises:  UserError: it is no folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"lora_dir must be a folder of {_ENDING} files; {folder} is none.")
        self._files: dict[str, list[Path]] = {}
        for file in sorted(self.folder.rglob(f"*{_ENDING}")):
            path = file.relative_to(self.folder).with_suffix("").as_posix()
            for name in {path, file.stem}:
                self._files.setdefault(name, []).append(file)

    @property
    def names(self) -> list[str]:
        """Of all files, as prompts may write them: the path, without the ending."""
        paths = dict.fromkeys(file for files in self._files.values() for file in files)
        return [path.relative_to(self.folder).with_suffix("").as_posix() for path in paths]

    def split(self, prompt: str) -> tuple[str, Files]:
        """A prompt without its tags, and what they ask for.

        Raises:  UserError: no such file, several of the name, or no weight that can be read.
        """
        files = tuple(self._file(*found.groups()) for found in NETWORK.finditer(prompt))
        return (NETWORK.sub("", prompt).strip() if files else prompt), files

    def _file(self, kind: str, name: str, weight: str | None) -> tuple[Path, float]:
        tag = f"<{kind}:{name}{'' if weight is None else f':{weight}'}>"
        if kind.lower() == "hypernet":
            raise UserError(f"{tag}: hypernetworks are not supported.")
        files = self._files.get(name.removesuffix(_ENDING), [])
        if not files:
            raise UserError(
                f"{tag}: there is no {name.removesuffix(_ENDING)}{_ENDING} in lora_dir."
                f"{did_you_mean(name, self._files)}"
            )
        if len(files) > 1:
            paths = some(str(file.relative_to(self.folder)) for file in files)
            raise UserError(f"{tag}: lora_dir has several: {paths}. Write the path.")
        try:
            return files[0], 1.0 if weight is None else float(weight)
        except ValueError:
            raise UserError(f"{tag}: a LoRA has one weight, such as 0.7; got {weight!r}.") from None
