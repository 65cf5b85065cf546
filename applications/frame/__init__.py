"""What the stories share: the command line, run folders, trainings that resume, data sets, pictures, Optuna studies."""
