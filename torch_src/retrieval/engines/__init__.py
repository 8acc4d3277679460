"""Optional back ends: Milvus for search, OpenVINO for encoding on a CPU."""
