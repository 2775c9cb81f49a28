"""Write cards and lineage, and publish a release to the Hub."""
