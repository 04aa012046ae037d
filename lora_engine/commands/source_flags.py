"""The flags of every command that reads image-caption pairs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `doctor` also runs where torch does not import
    from lora_engine.data.pairs import Pairs


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How to read a data source, where its content does not tell."""

    data_format: str = "auto"
    """Format of the data. auto: detected from its content."""
    image_field: str | None = None
    """Column or key that holds the images. Default: image, file_name, path, ..."""
    caption_field: str | None = None
    """Column or key that holds the captions. Default: text, caption, captions, ..."""
    image_root: str | None = None
    """Folder that image paths are relative to. Default: the folder of the file, or one near it that
    holds the images."""

    def read(self, data: str | tuple[str, ...], **settings) -> "Pairs":
        """Read a source as the flags say; `settings` are those of `read_pairs`."""
        from lora_engine.data.read_pairs import read_pairs
        from lora_engine.data.rows import SourceOptions

        options = SourceOptions(
            self.data_format, self.image_field, self.caption_field, self.image_root
        )
        return read_pairs(data, options, **settings)
