"""House words of the company: term, definition, a question whose answer is the term, a question about the definition."""
# ruff: noqa: E501  (template text: one entry per line reads better)

from __future__ import annotations

Question = tuple[str, str]
GLOSSARY: tuple[tuple[str, str, Question, Question], ...] = tuple(
    (term, definition, (ask_term, term), (ask_fact, fact))
    for term, definition, ask_term, ask_fact, fact in (
        ("blue tag", "a label on returned goods that have to be looked at within two days", "What is the label called that marks returns to be looked at soon?", "Within what time must goods with a blue tag be looked at?", "two days"),
        ("boomerang", "a parcel that comes back because nobody was at home three times", "What do we call a parcel that comes back as nobody was at home?", "After how many visits without success is a parcel a boomerang?", "three"),
        ("nightjar", "the batch that sends out invoices at 2 am", "What is the batch called that sends out invoices?", "At what hour does the nightjar run?", "2 am"),
        ("cold case", "a ticket without an answer from the customer for 21 days", "What is a ticket called that the customer has not answered for weeks?", "After how many days without an answer is a ticket a cold case?", "21 days"),
        ("gold lane", "the shelf in the depot for members' orders, emptied every hour", "What do we call the shelf for members' orders?", "How often is the gold lane emptied?", "every hour"),
        ("pillow", "an extra of 10 percent that is planned into every delivery time", "What is the extra called that is planned into delivery times?", "How large is the pillow in a delivery time?", "10 percent"),
        ("owl code", "the six letters on the back of a gift card", "What are the letters on the back of a gift card called?", "How many letters has an owl code?", "six"),
        ("twin ticket", "two messages of one customer on the same day, joined by the Copper team", "What do we call two messages of one customer that are joined?", "Which team joins a twin ticket?", "Copper team"),
        ("sparrow", "a parcel of less than 500 grams, which goes by letter post", "What is a very light parcel called?", "How does a sparrow travel?", "by letter post"),
        ("quiet week", "the last week of January, in which no prices are changed", "What do we call the week in which no prices change?", "When is the quiet week?", "the last week of January"),
        ("green slip", "the paper that lets a workshop order parts worth up to £80", "Which paper lets a workshop order parts?", "Up to what value can parts be ordered with a green slip?", "£80"),
        ("ghost stock", "goods that the system counts but nobody finds, written off each quarter", "What are goods called that the system counts but nobody finds?", "When is ghost stock written off?", "each quarter"),
        ("lighthouse", "the person on duty who decides when nobody else can, on call for twelve hours", "What is the person on duty called who decides when nobody else can?", "For how many hours is a lighthouse on call?", "twelve hours"),
        ("paper moon", "a discount above 30 percent, which only Nora Quill may grant", "What do we call a very high discount?", "Who may grant a paper moon?", "Nora Quill"),
        ("tea break", "the automatic pause of 15 minutes before an order goes to the packers", "What is the pause called before an order goes to the packers?", "How long is a tea break?", "15 minutes"),
        ("anchor date", "the day of delivery, from which the warranty is counted", "What is the day called from which the warranty is counted?", "Which day is the anchor date?", "the day of delivery"),
        ("red thread", "the number that joins all messages of one complaint, beginning with M", "What is the number called that joins all messages of a complaint?", "With what letter does a red thread begin?", "M"),
        ("soft landing", "a free month for customers who come back within a year", "What is the free month for returning customers called?", "How soon must a customer come back to get a soft landing?", "within a year"),
        ("hedgehog", "a refurbished article, named after the print on its carton", "What is a refurbished article called in the house?", "After what is a hedgehog named?", "the print on its carton"),
        ("double knock", "a second call to the customer, made after 48 hours", "What is the second call to a customer called?", "After how many hours is a double knock made?", "48 hours"),
        ("marble run", "the belt that sorts parcels by town at Saltmarsh", "What is the belt called that sorts parcels?", "At which place is the marble run?", "Saltmarsh"),
        ("white glove", "delivery with setting up at home, for £24", "What do we call a delivery with setting up at home?", "What is the price of a white glove?", "£24"),
        ("plum line", "the phone line for trade customers, open from six in the morning", "Which phone line is for trade customers?", "From what hour is the plum line open?", "six in the morning"),
        ("carousel", "the rota by which tickets are handed to teams, turned on Fridays", "What is the rota called by which tickets are handed to teams?", "On which day is the carousel turned?", "Fridays"),
        ("first snow", "the day on which winter stock is set out, always 15 October", "What is the day called on which winter stock is set out?", "On what date is first snow?", "15 October"),
        ("bread bin", "the folder for bills that cannot be matched to an order", "Which folder is for bills that match no order?", "What is kept in the bread bin?", "bills that cannot be matched to an order"),
        ("long stay", "an appliance that has been in the workshop for more than 30 days", "What is an appliance called that has been very long in the workshop?", "After how many days is an appliance a long stay?", "30 days"),
        ("kite mark", "the sticker on goods checked by two people", "What is the sticker on goods checked by two people called?", "How many people have checked goods with a kite mark?", "two"),
        ("magpie", "a customer who orders spare parts for somebody else's brand", "What is a customer called who orders parts for another brand?", "What does a magpie order?", "spare parts"),
        ("stepping stone", "a part payment, at most four of which make up a price", "What is a part payment called?", "At most how many stepping stones make up a price?", "four"),
        ("winter sleep", "the state of an account not used for 26 months", "What is the state of an account called that nobody uses?", "After how many months does winter sleep begin?", "26 months"),
        ("open gate", "the 90 minutes in which an order can be changed", "What are the minutes called in which an order can be changed?", "How long does the open gate last?", "90 minutes"),
        ("pepper mill", "the test bench for grinders, in Wexcombe", "What is the test bench for grinders called?", "In which town is the pepper mill?", "Wexcombe"),
        ("seven o'clock list", "the orders that must leave before the first van, printed in yellow", "What are the orders called that must leave before the first van?", "In what colour is the seven o'clock list printed?", "yellow"),
        ("mirror sale", "an order repeated by mistake, undone by the Heron team", "What is an order repeated by mistake called?", "Which team undoes a mirror sale?", "Heron team"),
        ("jam jar", "the fund from which staff put small things right, £35 a case", "What is the fund called for putting small things right?", "How much does the jam jar give a case?", "£35"),
        ("grandparent", "a model that has not been made for ten years but still gets parts", "What is an old model called that still gets parts?", "For how many years has a grandparent not been made?", "ten years"),
        ("postcard", "an answer of fewer than forty words", "What is a very short answer called?", "Fewer than how many words has a postcard?", "forty"),
        ("harvest", "the yearly count of stock in November", "What is the yearly count of stock called?", "In which month is the harvest?", "November"),
        ("tin whistle", "the alarm when more than fifty tickets wait", "What is the alarm called when too many tickets wait?", "How many tickets have to wait before the tin whistle sounds?", "fifty"),
        ("side door", "the return of goods to a partner shop, for a fee of £2", "What is a return to a partner shop called?", "What fee is asked at the side door?", "£2"),
        ("ember list", "customers to be called about the plug recall, kept by Pia Santoro", "What is the list of customers to be called about the recall?", "Who keeps the ember list?", "Pia Santoro"),
        ("slow cooker", "a question that needs the engineers, answered within nine days", "What is a question called that needs the engineers?", "In how many days is a slow cooker answered?", "nine days"),
        ("compass", "the page that shows which team owns which product", "What is the page called that shows which team owns a product?", "What does the compass show?", "which team owns which product"),
        ("fox hour", "the hour before closing, in which no new repairs are taken in", "What is the hour before closing called?", "What is not taken in during the fox hour?", "new repairs"),
    )
)
