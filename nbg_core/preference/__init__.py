"""Asset `filtered_pairs`, tables `pairs`, `scores` and `rejections`: the pairs where positive >> negative."""
