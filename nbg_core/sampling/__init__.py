"""Asset `student_samples`, table `samples`: responses of the current policy and, if the profile asks for them, of the
teacher."""
