"""Asset `student_checkpoint`, tables `checkpoints`, `checkpoint_pairs` and `training_steps`: DeepSpeed training."""
