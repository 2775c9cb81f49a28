"""A Hugging Face Hub look-alike on loopback, for tests with the real client.

    with LoopbackHub(tmp_path / "hub", tokens={"hf_ann": {"name": "ann"}}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_ann")
        api.create_repo("ann/model")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="ann/model")
        assert hub.read("ann/model", "config.json") == b"{}"

The client chooses Xet where it can, and then there is no way back to HTTP. So a
process that uploads needs ``hub.env`` before it first imports huggingface_hub.
"""

from .server import LoopbackHub

__all__ = ["LoopbackHub"]
