"""The parts of a published release that a person agreed to remove. Nothing else is removed by publishing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from pipeline.errors import HubError
from pipeline.hub.tree import Tree
from pipeline.publishing.published_model import PublishedModel

# Libraries load an adapter at a repository's root on top of its model, and of the models in its folders.
ROOT_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Removal:
    """The agreed removals.

    Attributes:
        variants: names of variants.
        others: every variant that the configuration does not name.
        adapter: an adapter at the root of the repository, which tunepress did not put there.
    """

    variants: tuple[str, ...] = ()
    others: bool = False
    adapter: bool = False

    @property
    def options(self) -> list[str]:
        """Return the command-line options that ask for these removals."""
        flags = {"--replace": self.others, "--replace-adapter": self.adapter}
        named = [word for variant in self.variants for word in ("--remove", variant)]
        return [*named, *(flag for flag, is_set in flags.items() if is_set)]

    def after(self, earlier: Removal, asked: Collection[str]) -> Removal:
        """Return this and earlier agreements, except for variants that are asked for now."""
        names = dict.fromkeys((*earlier.variants, *self.variants))
        variants = tuple(name for name in names if name not in asked)
        return Removal(variants, earlier.others or self.others, earlier.adapter or self.adapter)

    def adapter_files(self, tree: Tree) -> frozenset[str]:
        """Return the files of the adapter to remove from the root of a repository."""
        return frozenset(ROOT_ADAPTER if self.adapter else ()) & (tree.files.keys() - tree.ours)

    def check_variants(self, tree: Tree, asked: Collection[str]) -> None:
        """Raise if publishing would remove variants that nobody agreed to remove.

        Args:
            asked: the variants of the configuration.

        Raises:
            HubError: naming them.
        """
        if self.others:
            return
        lost = [v for v in published_variants(tree) if v not in asked and v not in self.variants]
        if lost:
            options = " ".join(f"--remove {variant}" for variant in lost)
            raise HubError(
                f"{tree.repo}: has {', '.join(lost)}, which this configuration does not make, and which publishing "
                f"would remove. Try: add to quantize.variants, or {options}"
            )

    def check_adapter(self, tree: Tree) -> None:
        """Raise if an adapter of other people is at the root.

        Raises:
            HubError: naming it.
        """
        if not self.adapter and ROOT_ADAPTER[0] in tree.files.keys() - tree.ours:
            raise HubError(
                f"{tree.repo}: has an adapter of other origin at its root ({ROOT_ADAPTER[0]}), which libraries would "
                "load on top of every model there. Try: --replace-adapter to remove it, or another repository"
            )


NO_REMOVAL = Removal()


def published_variants(tree: Tree) -> tuple[str, ...]:
    """Return the variants of the release in a repository.

    Raises:
        HubError: if its lineage is damaged.
    """
    try:
        return tuple(PublishedModel.of(tree).results.variants)
    except HubError as error:
        raise HubError(f"{error}, so its variants are unknown. Try: --replace to keep none of them") from None
