"""Asset `student_eval`, tables `evaluations` and `promotions`: held-out accuracy, and the gate for promotion."""
