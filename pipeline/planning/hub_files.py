"""The files of a model on the Hub, read where they lie."""

from __future__ import annotations

from pipeline.hub.download import in_one_line, remote_files
from pipeline.planning.headers import Tensor, safetensors_header


class Repository:
    """The files of a Hub repository at one commit, read in byte ranges, or in the cache if the Hub is off."""

    def __init__(self, repo: str, revision: str | None):
        self.repo = repo
        with in_one_line(repo, revision, "not a folder here, and the Hub could not be read"):
            found = remote_files(repo, revision)
        self.revision, self.files, self._folder = found.revision, found.sizes, found.folder

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return a file's bytes from `start` up to `stop`, or up to its end."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        if self._folder:
            with open(self._folder / name, "rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)
        url = hf_hub_url(self.repo, name, revision=self.revision)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if stop is not None:
            stop = min(stop, self.files[name])
            headers["Range"] = f"bytes={start}-{stop - 1}"
            if start >= stop:
                return b""
        with in_one_line(self.repo, self.revision, f"{name} could not be read"):
            answer = get_session().get(url, headers=headers, timeout=30)
            hf_raise_for_status(answer)
        return answer.content

    def headers(self, shards: list[str]) -> dict[str, Tensor]:
        """Return the tensors of several files, whose headers are read at the same time."""
        from concurrent.futures import ThreadPoolExecutor

        def header(name: str) -> dict[str, Tensor]:
            return safetensors_header(f"{self.repo}/{name}", lambda start, stop: self.read(name, start, stop))

        with ThreadPoolExecutor(8) as pool:
            return {name: tensor for found in pool.map(header, shards) for name, tensor in found.items()}

    def is_here(self, name: str) -> bool:
        """Return True if the Hub's cache has the file."""
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.repo, name, revision=self.revision), str)
