"""Asset `teacher_logits`, table `teacher_logits`: the teacher's distribution at every response position."""
