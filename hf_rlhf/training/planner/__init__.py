"""The planner: where models go, what each device holds, and how long a step takes, by arithmetic on shapes."""
