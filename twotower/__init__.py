"""Two-tower retrieval on Ray: interactions in, recommendations out."""

__version__ = "0.1.0"
