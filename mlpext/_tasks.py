"""What a target may be taken for, in a data set and in a table."""

TASKS = ("auto", "classes", "numbers")

# With task="auto" a target of whole numbers is classes up to so many different ones, beyond that a quantity.
MOST_CLASSES = 20
