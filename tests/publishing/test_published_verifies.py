"""Published releases of every kind: they verify right after publishing."""

from __future__ import annotations

from pipeline.verification import Verdict, verify
from tests.support.fake_runs import MIRROR, REPO, SOURCE_CARD, WITH_GGUF
from tests.support.releases import told

MADE_UP = "figures tunepress.json:"  # which have nothing to do with the few bytes that stand for models here


def check(release: str) -> list[str]:
    """Return the checks that were not possible; there is no other finding."""
    found = verify(release, measure=False)
    assert [line for line in told(found) if not line.startswith(MADE_UP)] == []
    assert sum(line.startswith("card ") for line in told(found, Verdict.right)) >= 1
    return told(found, Verdict.unknown)


def test_fine_tuned_model_verifies_here_and_on_the_hub(hub, finished):
    finished.publish()
    assert check(REPO) == check(str(finished.release)) == []


def test_mirror_and_main_repository_verify(hub, mirrored):
    mirrored.publish()
    assert check(REPO) == check(MIRROR) == []


def test_variants_beside_their_source_verify(hub, guest):
    hub.put(REPO, {"README.md": SOURCE_CARD})
    guest.publish()
    assert check(REPO) == [
        "files model.safetensors: of the source model, not of this release, so nothing is known about it"
    ]


def test_gguf_release_verifies_here_and_on_the_hub(hub, shared):
    shared.publish(WITH_GGUF)
    assert check(str(shared.release)) == []
    assert check(REPO) == ["card gguf/Modelfile: not checked: the GGUF files were not downloaded"]
    (shared.release / "gguf/Modelfile").write_text("FROM ./demo-Q4_0.gguf\n")
    found = verify(str(shared.release), measure=False)
    assert told(found)[-1] == "card gguf/Modelfile: does not follow from the GGUF files beside it"
