"""What a user asks about a program: explain, the roofline, tuning."""
