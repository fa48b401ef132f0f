"""Turn configs of TRL's trainers into recipes."""
