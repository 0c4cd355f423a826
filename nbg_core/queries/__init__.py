"""Asset `queries`, tables `queries` and `rejections`: query files, validated, deduplicated and split."""
