"""What produces the numbers in README: each program measures a baseline beside us in the same run."""
