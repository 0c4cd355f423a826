"""Asset `queries`, tables `queries` and `rejections`: query files, validated, deduplicated and split into training and
held-out queries."""
