"""Raw files to a prepared dataset. numpy and pyarrow only: no torch, faiss or ray."""
