"""The real client against the loopback Hub: the same successes and failures as on the Hub."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import default_client_factory

from pipeline.hub.client import prepare
from tests.support import REPOSITORY
from tests.support.hub import LoopbackHub
from tests.support.hub.store import HubError

TOKENS = {
    "hf_ann": {"name": "ann", "orgs": ["lab"]},
    "hf_ann_reads": {"name": "ann", "role": "read"},
    "hf_bob": {"name": "bob"},
}
REPO = "ann/model"
WEIGHTS = os.urandom(300_000)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    set_client_factory(default_client_factory)  # the client as it is, whatever was made of it in this process
    prepare.cache_clear()
    with LoopbackHub(tmp_path / "hub", TOKENS) as hub:
        yield hub


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.url, token="hf_ann")
    api.create_repo(REPO)
    return api


def commit(api, files, repo=REPO, **options):
    """Commit additions (bytes) and deletions (None), by path."""
    operations = [
        CommitOperationDelete(path) if content is None else CommitOperationAdd(path, content)
        for path, content in files.items()
    ]
    return api.create_commit(repo, operations, commit_message="change", **options)


def client(hub, token):
    return HfApi(endpoint=hub.url, token=token)


def uploaded(hub):
    """The sizes of the LFS objects that were sent."""
    return [request.body_bytes for request in hub.requests if request.method == "PUT"]


def status_of(error):
    return error.value.response.status_code


def call(hub, method, path, body=None, token="hf_ann"):
    """A request that the client would never send: the status and the reply."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(hub.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def send_commit(hub, *operations, query=""):
    lines = [{"key": "header", "value": {"summary": "by hand"}}]
    lines += [{"key": key, "value": value} for key, value in operations]
    return call(hub, "POST", f"/api/models/{REPO}/commit/main{query}", "\n".join(map(json.dumps, lines)).encode())


# -- repositories


def test_a_new_repository_exists_once_and_has_gitattributes(hub, api):
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert status_of(error) == 409


def test_a_name_without_owner_means_the_asker(hub, api):
    assert api.create_repo("other").repo_id == "ann/other"
    assert api.whoami()["name"] == "ann"


def test_a_deleted_repository_is_gone(hub, api):
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(REPO)


def test_visibility_can_be_changed(hub, api):
    bob = client(hub, "hf_bob")
    assert bob.repo_exists(REPO)
    api.update_repo_settings(REPO, private=True)
    assert api.model_info(REPO).private and not bob.repo_exists(REPO)
    api.update_repo_settings(REPO, private=False)
    assert bob.repo_exists(REPO)


def test_info_tells_the_files_and_the_metadata_of_the_card(hub, api):
    card = b"---\nlicense: mit\ntags:\n- tunepress\n- gguf\nmodel-index:\n- name: x\n---\n# Hi\n"
    head = commit(api, {"README.md": card, "model.safetensors": WEIGHTS}).oid
    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.gated, info.tags, info.card_data.license) == (head, False, ["tunepress", "gguf"], "mit")
    assert info.used_storage > len(WEIGHTS)
    weights = next(file for file in info.siblings if file.rfilename == "model.safetensors")
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())


# -- uploads


def test_a_commit_carries_large_and_regular_files(hub, api, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(WEIGHTS)
    done = commit(api, {"model.safetensors": file, "config.json": b"{}", "int4/notes.txt": b"text", "empty.bin": b""})
    assert hub.commits(REPO)[0] == done.oid
    assert hub.read(REPO, "model.safetensors") == WEIGHTS and hub.read(REPO, "empty.bin") == b""
    assert hub.files(REPO)["int4/notes.txt"] == 4
    in_lfs = [path for path, entry in hub.commit_files(REPO, done.oid).items() if entry.lfs]
    assert in_lfs == ["model.safetensors"] and uploaded(hub) == [len(WEIGHTS)]


def test_binary_content_goes_through_lfs_whatever_its_name(hub, api):
    commit(api, {"tokenizer.model": b"\0\1\2"})
    assert uploaded(hub) == [3]


def test_known_blobs_are_not_sent_again(hub, api):
    commit(api, {"a/model.safetensors": WEIGHTS})
    commit(api, {"b/model.safetensors": WEIGHTS, "a/model.safetensors": WEIGHTS, "config.json": b"{}"})
    assert uploaded(hub) == [len(WEIGHTS)]
    assert hub.read(REPO, "b/model.safetensors") == WEIGHTS


def test_a_commit_without_changes_is_left_out_by_the_client(hub, api):
    first = commit(api, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    again = commit(api, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    assert again.oid == first.oid and len(hub.commits(REPO)) == 2


def test_empty_commit_is_created_if_sent(hub, api):
    before = hub.files(REPO)
    assert send_commit(hub)[0] == 200
    assert hub.files(REPO) == before and len(hub.commits(REPO)) == 2


def test_an_upload_with_another_content_than_announced_is_refused(hub, api):
    oid, size = hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS)

    def invited(size):
        batch = json.dumps({"objects": [{"oid": oid, "size": size}], "ref": {"name": "main"}}).encode()
        reply = json.loads(call(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", batch)[1])
        return reply["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.url)

    assert call(hub, "PUT", invited(size), WEIGHTS[::-1], token=None)[0] == 400
    assert call(hub, "PUT", invited(size + 1), WEIGHTS, token=None)[0] == 400
    assert call(hub, "PUT", invited(size).replace("signature=", "signature=0"), WEIGHTS, token=None)[0] == 403
    assert not hub.repo(REPO).objects
    assert call(hub, "PUT", invited(size), WEIGHTS, token=None)[0] == 200
    assert hub.repo(REPO).objects == {oid: size}


def test_a_commit_needs_the_objects_it_names(hub, api):
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    assert send_commit(hub, ("lfsFile", {"path": "w.bin", "oid": oid}))[0] == 400
    commit(api, {"model.safetensors": WEIGHTS})
    assert send_commit(hub, ("lfsFile", {"path": "w.bin", "oid": oid, "size": 1}))[0] == 400
    assert send_commit(hub, ("lfsFile", {"path": "w.bin", "oid": oid}))[0] == 200
    assert hub.read(REPO, "w.bin") == WEIGHTS


def test_upload_folder_and_delete_folder(hub, api, tmp_path):
    (tmp_path / "out" / "int8").mkdir(parents=True)
    (tmp_path / "out" / "int8" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "out" / "config.json").write_text("{}")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "out")
    assert {"int8/model.safetensors", "config.json"} <= hub.files(REPO).keys()
    api.delete_folder("int8", REPO)
    assert hub.files(REPO).keys() == {".gitattributes", "config.json"}


def test_deleting_a_missing_file_fails_and_changes_nothing(hub, api):
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        commit(api, {"config.json": b"{}", "missing.txt": None})
    assert "config.json" not in hub.files(REPO)


def test_files_can_be_copied_from_an_older_commit(hub, api):
    old = commit(api, {"model.safetensors": WEIGHTS, "config.json": b"{}"}).oid
    commit(api, {"model.safetensors": WEIGHTS[:1000], "config.json": b"[]"})
    back = [CommitOperationCopy(path, path, src_revision=old) for path in ("model.safetensors", "config.json")]
    api.create_commit(REPO, back, commit_message="back")
    assert hub.read(REPO, "model.safetensors") == WEIGHTS and hub.read(REPO, "config.json") == b"{}"
    assert uploaded(hub) == [len(WEIGHTS), 1000]
    assert send_commit(hub, ("copyFile", {"srcPath": "config.json", "path": "a/b.json"}))[0] == 200
    assert hub.read(REPO, "a/b.json") == b"{}"


def test_a_moved_head_answers_412(hub, api):
    head = api.model_info(REPO).sha
    ours = hub.put(REPO, {"other.txt": b"slipped in"})
    with pytest.raises(HfHubHTTPError) as error:
        commit(api, {"config.json": b"{}"}, parent_commit=head)
    assert status_of(error) == 412 and "config.json" not in hub.files(REPO)
    commit(api, {"config.json": b"{}"}, parent_commit=ours)
    assert {"config.json", "other.txt"} <= hub.files(REPO).keys()


def test_a_pull_request_leaves_main_alone_and_takes_more_commits(hub, api):
    bob = client(hub, "hf_bob")
    done = commit(bob, {"config.json": b"{}", "model.safetensors": WEIGHTS}, create_pr=True)
    assert done.pr_revision == "refs/pr/1" and "config.json" not in hub.files(REPO)
    assert hub.read(REPO, "model.safetensors", "refs/pr/1") == WEIGHTS
    commit(api, {"more.txt": b"more"}, revision="refs/pr/1")
    assert "more.txt" in api.list_repo_files(REPO, revision="refs/pr/1")
    requests = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert [request.ref for request in requests] == ["refs/pr/1"]


def test_a_pull_request_starts_from_the_parent_it_names(hub, api):
    head = api.model_info(REPO).sha
    hub.put(REPO, {"later.txt": b"later"})
    commit(api, {"config.json": b"{}"}, create_pr=True, parent_commit=head)
    assert hub.files(REPO, "refs/pr/1").keys() == {".gitattributes", "config.json"}


def test_a_pull_request_is_listed_until_it_is_closed_or_merged(hub, api):
    bob = client(hub, "hf_bob")
    for n in range(12):
        bob.create_commit(REPO, [CommitOperationAdd(f"{n}.txt", b"x")], commit_message=f"file {n}", create_pr=True)
    hub.put(REPO, {"later.txt": b"later"})
    listed = list(api.get_repo_discussions(REPO, discussion_type="pull_request", discussion_status="open"))
    assert [(d.num, d.title, d.author) for d in listed] == [(n, f"file {n - 1}", "bob") for n in range(12, 0, -1)]
    api.change_discussion_status(REPO, 1, "closed")
    api.merge_pull_request(REPO, 2)
    assert [api.get_discussion_details(REPO, n).status for n in (1, 2, 3)] == ["closed", "merged", "open"]
    assert len(list(api.get_repo_discussions(REPO, discussion_status="open"))) == 10
    assert hub.files(REPO).keys() == {".gitattributes", "later.txt", "1.txt"}


@pytest.mark.parametrize("path", ["../x", "a/../x", "/x", "a//x", "a/", "", ".", ".git/config", "a\\b"])
def test_paths_that_lead_out_are_refused(hub, api, path):
    content = {"path": path, "content": "", "encoding": "base64"}
    assert send_commit(hub, ("file", content))[0] == 400
    assert hub.files(REPO).keys() == {".gitattributes"}


def test_names_that_lead_out_are_refused(hub, api):
    for name in ("..", "a/b", "../../x", "x.git", "a..b", ""):
        assert call(hub, "POST", "/api/repos/create", json.dumps({"name": name}).encode())[0] == 400
    assert call(hub, "GET", f"/{REPO}/resolve/main/..%2F..%2Fsecret")[0] == 400
    with pytest.raises(HubError):
        hub.put(REPO, {"../x": b""})


def test_a_path_is_a_file_or_a_folder(hub, api):
    commit(api, {"a": b"file"})
    with pytest.raises(BadRequestError):
        commit(api, {"a/b": b"file"})


def test_a_card_with_a_bad_base_model_is_refused(hub, api):
    with pytest.raises(ValueError, match="base_model"):
        commit(api, {"README.md": b"---\nbase_model: /home/me/model\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(api, {"README.md": b"# no metadata\n"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        commit(api, {"README.md": b"---\nbase_model: org/base\n---\n"})


# -- who may do what


def test_unknown_token_answers_401(hub, api):
    stranger = client(hub, "hf_wrong")
    for request in (stranger.whoami, lambda: stranger.model_info(REPO), lambda: commit(stranger, {"x": b""})):
        with pytest.raises(HfHubHTTPError) as error:
            request()
        assert status_of(error) == 401 and not isinstance(error.value, RepositoryNotFoundError)


def test_a_token_that_only_reads_answers_403(hub, api):
    reader = client(hub, "hf_ann_reads")
    assert reader.repo_exists(REPO)
    writing = (
        lambda: commit(reader, {"x": b""}),
        lambda: reader.create_repo("ann/new"),
        lambda: reader.delete_repo(REPO),
        lambda: reader.create_tag(REPO, tag="v1"),
    )
    for request in writing:
        with pytest.raises(HfHubHTTPError) as error:
            request()
        assert status_of(error) == 403


def test_only_the_owner_writes(hub, api):
    with pytest.raises(HfHubHTTPError) as error:
        commit(client(hub, "hf_bob"), {"x": b""})
    assert status_of(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        commit(client(hub, False), {"x": b""})
    assert status_of(error) == 401
    api.create_repo("lab/model")
    commit(api, {"x": b""}, repo="lab/model")


def test_a_private_repository_is_invisible_to_others(hub, api, tmp_path):
    api.create_repo("ann/secret", private=True)
    commit(api, {"config.json": b"{}"}, repo="ann/secret")
    assert client(hub, "hf_ann_reads").model_info("ann/secret").private
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            client(hub, token).model_info("ann/secret")
        with pytest.raises(RepositoryNotFoundError):
            commit(client(hub, token), {"x": b""}, repo="ann/secret")
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("ann/secret", "config.json", endpoint=hub.url, token=token, cache_dir=tmp_path)


# -- downloads and listings


def test_downloads_give_back_what_was_uploaded(hub, api, tmp_path):
    files = {"model.safetensors": WEIGHTS, "int8/model.safetensors": WEIGHTS[:999], "int8/config.json": b"{}"}
    done = commit(api, files)
    where = dict(endpoint=hub.url, token="hf_ann", cache_dir=tmp_path / "cache")
    file = hf_hub_download(REPO, "config.json", subfolder="int8", **where)
    assert done.oid in file and Path(file).read_bytes() == b"{}"
    folder = snapshot_download(REPO, **where)
    for path, content in files.items():
        assert Path(folder, path).read_bytes() == content
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json", **where)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v9", **where)


def test_a_file_is_served_in_part(hub, api):
    commit(api, {"model.safetensors": WEIGHTS})

    def part(header):
        url = f"{hub.url}/{REPO}/resolve/main/model.safetensors"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": header})) as reply:
            return reply.status, reply.headers["Content-Range"], reply.read()

    size = len(WEIGHTS)
    assert part("bytes=0-7") == (206, f"bytes 0-7/{size}", WEIGHTS[:8])
    assert part("bytes=299990-") == (206, f"bytes 299990-{size - 1}/{size}", WEIGHTS[299990:])
    assert part("bytes=-5") == (206, f"bytes {size - 5}-{size - 1}/{size}", WEIGHTS[-5:])
    with pytest.raises(urllib.error.HTTPError) as error:
        part(f"bytes={size}-")
    assert error.value.code == 416


def test_trees_list_files_and_folders_with_their_last_change(hub, api):
    first = commit(api, {"config.json": b"{}", "int8/a/model.safetensors": WEIGHTS}).oid
    second = commit(api, {"int8/b.txt": b"b"}).oid

    def paths(items):
        return {item.path for item in items}

    assert paths(api.list_repo_tree(REPO)) == {".gitattributes", "config.json", "int8"}
    assert paths(api.list_repo_tree(REPO, "int8")) == {"int8/a", "int8/b.txt"}
    everything = {item.path: item for item in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert everything["int8"].last_commit.oid == second and everything["int8/a"].last_commit.oid == first
    assert everything["int8/a/model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert paths(api.get_paths_info(REPO, ["int8", "config.json", "missing"])) == {"int8", "config.json"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))


def test_history_tags_and_branches(hub, api):
    first = commit(api, {"config.json": b"1"}).oid
    api.create_tag(REPO, tag="v1.0", tag_message="first")
    api.create_branch(REPO, branch="next", revision=first[:8])
    second = commit(api, {"config.json": b"2"}, revision="next").oid
    assert [item.commit_id for item in api.list_repo_commits(REPO, revision="next")][:2] == [second, first]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "next": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0": first}
    assert hub.read(REPO, "config.json", "v1.0") == b"1" and api.model_info(REPO, revision="v1.0").sha == first
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag(REPO, tag="v1.0")
    assert status_of(error) == 409
    api.create_tag(REPO, tag="v1.0", exist_ok=True)
    with pytest.raises(BadRequestError):
        commit(api, {"config.json": b"3"}, revision="v1.0")
    api.delete_tag(REPO, tag="v1.0")
    api.delete_branch(REPO, branch="next")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1.0")
    with pytest.raises(HfHubHTTPError):
        api.delete_branch(REPO, branch="main")


# -- faults


def test_the_client_survives_an_unwell_hub(hub, api, tmp_path):
    hub.fault(r"PUT /lfs-storage", status=503)
    commit(api, {"model.safetensors": WEIGHTS})
    assert uploaded(hub) == [len(WEIGHTS)] * 2 and hub.read(REPO, "model.safetensors") == WEIGHTS
    hub.fault(r"GET .*/resolve/", status=429)
    file = hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, cache_dir=tmp_path)
    assert Path(file).read_bytes() == WEIGHTS


def test_a_commit_may_happen_and_its_answer_be_lost(hub, api):
    hub.fault(r"POST .*/commit/", reset=True, after=True)
    with pytest.raises(Exception) as error:
        commit(api, {"config.json": b"{}"})
    assert not isinstance(error.value, HfHubHTTPError)
    assert hub.read(REPO, "config.json") == b"{}" and hub.requests[-1].status == 0


def test_concurrent_commit_can_come_first(hub, api):
    head = api.model_info(REPO).sha
    hub.fault(r"POST .*/commit/", first=lambda: hub.put(REPO, {"other.txt": b"slipped in"}))
    with pytest.raises(HfHubHTTPError) as error:
        commit(api, {"config.json": b"{}"}, parent_commit=head)
    assert status_of(error) == 412 and hub.read(REPO, "other.txt") == b"slipped in"


def test_a_stall_is_only_slow(hub, api):
    hub.fault(r"GET /api/whoami", stall=0.2)
    assert api.whoami()["name"] == "ann"


def test_stopped_hub_does_not_answer(tmp_path):
    with LoopbackHub(tmp_path, TOKENS) as hub:
        api = client(hub, "hf_ann")
        api.whoami()
    with pytest.raises(Exception) as error:
        api.whoami()
    assert not isinstance(error.value, HfHubHTTPError)


# -- other libraries, and the command line, in processes of their own


def python(code, **environment):
    """Run `code` in a fresh process and return what it prints last."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_transformers_loads_from_a_subfolder(hub, api, tmp_path):
    pytest.importorskip("transformers")
    code = """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from huggingface_hub import HfApi
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)
    made = LlamaForCausalLM(config)
    made.save_pretrained({folder!r})
    HfApi().upload_folder(repo_id={repo!r}, folder_path={folder!r}, path_in_repo="int8")
    loaded = AutoModelForCausalLM.from_pretrained({repo!r}, subfolder="int8")
    print(all((a == b).all() for a, b in zip(made.parameters(), loaded.parameters())))
    """.format(folder=str(tmp_path / "tiny"), repo=REPO)
    assert python(code, **hub.env_for("hf_ann", tmp_path / "home")) == "True"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_datasets_loads_a_private_set_at_a_revision(hub, tmp_path, kind):
    pytest.importorskip("datasets")
    rows = [{"prompt": f"question {n}", "completion": str(n)} for n in range(5)]
    card = (
        b"---\nconfigs:\n- config_name: short\n  data_files: short/*\n- config_name: long\n  data_files: long/*\n---\n"
    )
    files = {f"short/train.{kind}": _table(rows[:2], kind), f"long/train.{kind}": _table(rows, kind), "README.md": card}
    first = hub.put("ann/data", files, repo_type="dataset", private=True)
    hub.put("ann/data", {f"long/train.{kind}": _table(rows[:1], kind)}, repo_type="dataset")
    code = f"""
    import json
    from datasets import load_dataset
    heads = (None, {first!r})
    print(json.dumps([load_dataset("ann/data", "long", split="train", revision=r).to_list() for r in heads]))
    """
    assert json.loads(python(code, **hub.env_for("hf_ann", tmp_path / "home"))) == [rows[:1], rows]


def _table(rows: list[dict], kind: str) -> bytes:
    """A file of a data set."""
    if kind == "jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), file)
    return file.getvalue()


def test_the_hub_runs_by_hand(tmp_path):
    command = [sys.executable, "-m", "tests.support.hub", str(tmp_path), "--token", "ann=hf_ann"]
    root = REPOSITORY
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        url = re.fullmatch(r"export HF_ENDPOINT=(\S+)\n", process.stdout.readline())[1]
        try:
            assert HfApi(endpoint=url, token="hf_ann").whoami()["name"] == "ann"
        finally:
            process.terminate()
