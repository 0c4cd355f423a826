"""Asset `student_eval`, tables `evaluations` and `promotions`: accuracy on held-out queries, and the promotion gate."""
