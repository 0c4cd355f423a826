"""Asset `student_samples`, table `samples`: responses of the current policy and, as a setting, the teacher."""
