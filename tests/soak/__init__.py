"""A soak: hours of steady load under faults that come by chance, and a count of every event at the end."""
