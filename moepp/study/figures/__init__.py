"""`moepp figures`: text through a model once → counts → findings with intervals, and pictures."""
