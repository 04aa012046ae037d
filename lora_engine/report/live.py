"""report.html while its run goes on: written anew at each validation."""

import logging
import time
from collections.abc import Callable
from functools import lru_cache, partial

from lora_engine.report.gallery import thumbnail
from lora_engine.report.page import write_report
from lora_engine.report.run_folder import RunFolder

logger = logging.getLogger(__name__)

MAX_SHARE = 0.02  # of a run's time


class LiveReport:
    """A run's report; `read` gives the bytes of an image by its name, and raises ImageError.

    Each image is encoded once.
    """

    def __init__(self, folder: RunFolder, *, read: Callable[[str], bytes]) -> None:
        self.folder = folder
        self._thumbnail = lru_cache(maxsize=256)(partial(thumbnail, read=read))
        self._written_s, self._took_s = time.monotonic(), 0.0
        self._has_failed = False

    def update(self) -> None:
        """Write the report of a run that goes on, unless validations are so frequent that it would
        take more than MAX_SHARE of the time. A failure only causes a warning, the first time."""
        begin_s = time.monotonic()
        since_s = begin_s - self._written_s
        if not self.folder.is_writer or self._took_s > MAX_SHARE * since_s:
            return
        try:
            self._write(running=[self.folder.path], reload_s=round(min(max(since_s, 10), 600)))
        except Exception as error:  # a full disk, a file that somebody changed
            if not self._has_failed:
                logger.warning(
                    f"the report could not be written, but training goes on: "
                    f"{type(error).__name__}: {error}"
                )
            self._has_failed = True
        self._written_s = time.monotonic()
        self._took_s = self._written_s - begin_s

    def finish(self) -> None:
        """Write the report of a run that has ended."""
        self._write()

    def _write(self, **options) -> None:
        write_report(
            [self.folder.path], self.folder.report, thumbnail=self._thumbnail, **options
        )
