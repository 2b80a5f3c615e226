"""What a step costs and whether it is right: predicted from shapes, timed against what others would write, certified.

May import ``training`` and below. Imported by the reports and the command line, by nothing that trains.
"""
