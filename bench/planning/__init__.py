"""Does a plan predict what a step takes, and what does it say of clusters that nobody can try here?"""
