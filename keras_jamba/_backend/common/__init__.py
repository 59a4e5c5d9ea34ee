"""What two backends share."""
