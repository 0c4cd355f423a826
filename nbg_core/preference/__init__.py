"""Asset `filtered_pairs`, tables `pairs`, `scores` and `rejections`: scored responses, and the pairs with a wide margin
between chosen and rejected."""
